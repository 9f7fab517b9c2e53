"""Training, loading and refusing tokenizers."""

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_stacking.common.errors import UserError
from ds_stacking.data.tokenizer import (
    SPECIAL_TOKENS,
    count_vocabulary,
    load_tokenizer,
    special_ids,
    text_encoder,
    tokenizer_hash,
    train_tokenizer,
)

PRINT_HASH = """
import sys
from ds_stacking.data.tokenizer import tokenizer_hash, train_tokenizer
print(tokenizer_hash(train_tokenizer(sys.stdin.read().split("\\0"), 600, True)))
"""


@pytest.fixture(scope="module")
def trained(documents: list[str]):
    return train_tokenizer(documents, 600, True)


def test_a_trained_tokenizer_loads_as_a_hugging_face_folder(trained, documents: list[str], tmp_path: Path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 600 == count_vocabulary(loaded)
    assert loaded.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert loaded.mask_token == "[MASK]" and loaded.model_max_length == 512
    assert loaded("The class", "the Function")["input_ids"][0] == loaded.cls_token_id

    assert loaded.decode(loaded("The CLASS returns").input_ids, skip_special_tokens=True) == "the class returns"
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(trained)
    ids = [i for text in documents for i in loaded(text).input_ids]
    assert ids.count(loaded.unk_token_id) < 0.01 * len(ids)
    assert "class" in loaded.get_vocab() and "Class" not in loaded.get_vocab()


def test_case_is_kept_on_request(documents: list[str]):
    assert "The" in train_tokenizer(documents, 600, False).get_vocab()


def test_training_is_the_same_in_every_process(trained, documents: list[str]):
    """`tokenizers` alone gives another vocabulary in each process."""
    result = subprocess.run(
        [sys.executable, "-c", PRINT_HASH], input="\0".join(documents), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == tokenizer_hash(trained)


def test_rare_characters_do_not_fill_the_vocabulary():
    chinese = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    vocabulary = train_tokenizer(["common words are here " * 50, chinese], 320, True).get_vocab()
    assert "common" in vocabulary
    assert not any(character in vocabulary for character in chinese)


def test_special_tokens_in_a_text_are_text(trained):
    ids = text_encoder(trained).encode("replace it by [MASK] and [SEP]", add_special_tokens=False).ids
    assert set(ids).isdisjoint(set(special_ids(trained).all_ids) - {trained.unk_token_id})
    assert trained.mask_token_id in trained("replace it by [MASK]").input_ids  # else the test could not fail


def test_the_hash_forgets_truncation_and_padding_but_not_the_vocabulary(trained, documents: list[str]):
    before = tokenizer_hash(trained)
    trained(documents[:2], truncation=True, max_length=16, padding=True)
    assert tokenizer_hash(trained) == before
    assert tokenizer_hash(train_tokenizer(documents, 599, True)) != before


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path):
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]", sep_token="a").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pad, cls, mask token; give one"):
        load_tokenizer(str(tmp_path))


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_snapshot_of_the_hub_s_cache_is_links_into_its_own_model(trained, tmp_path: Path):
    model, secret = tmp_path / "models--org--name", tmp_path / "secret.json"
    trained.save_pretrained(model / "blobs")
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for blob in (model / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert len(load_tokenizer(str(snapshot))) == 600
    (model / "blobs" / "tokenizer.json").rename(secret)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../secret.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is a link"):
        load_tokenizer(str(snapshot))
