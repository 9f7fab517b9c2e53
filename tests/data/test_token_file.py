"""Token files against the tokenizer's own answer, document by document."""

import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy

from ds_stacking.common.errors import UserError
from ds_stacking.data.preparation.documents import clean_text, is_held_out
from ds_stacking.data.preparation.shards import ShardWriter, SplitWriter
from ds_stacking.data.preparation.worker import DocumentTokenizer, WorkerConfig
from ds_stacking.data.token_file import TokenFile, token_type, unigram_entropy
from ds_stacking.data.tokenizer import text_encoder, train_tokenizer


@pytest.fixture(scope="module")
def trained(documents: list[str]):
    return train_tokenizer(documents, 600, True)


def write(folder: Path, documents: list[str], tokenizer, vocab_size: int = 600) -> dict:
    """A shard of these documents, in batches of seven; returns its manifest."""
    config = WorkerConfig(
        tokenizer=text_encoder(tokenizer).to_str(),
        sep=tokenizer.sep_token_id,
        dtype=token_type(vocab_size).name,
        eval_percent=30,
        sentences=False,
        near_duplicates=False,
    )
    texts, maker = list(map(clean_text, documents)), DocumentTokenizer(config)
    writer = ShardWriter(folder, 0, vocab_size=vocab_size, sentences=False)
    for begin in range(0, len(texts), 7):
        batch = maker.tokenise(texts[begin : begin + 7])
        writer.add(batch, np.ones(len(batch.lengths), bool))
    return dict(writer.close(len(documents)))


@pytest.mark.parametrize("vocab_size", [600, 70_000])
def test_documents_come_back(tmp_path: Path, documents: list[str], trained, vocab_size: int):
    manifest = write(tmp_path, ["\x00 \x7f", *documents], trained, vocab_size)  # the first has no tokens
    folder = tmp_path / "shard-00000"
    assert manifest["dtype"] == ("uint16" if vocab_size == 600 else "uint32")
    for split in ("train", "eval"):
        file = TokenFile.open(folder, split, manifest)
        texts = [text for text in map(clean_text, documents) if is_held_out(text, 30) == (split == "eval")]
        expected = [[*trained(text, add_special_tokens=False).input_ids, trained.sep_token_id] for text in texts]
        pieces = [file.tokens[a:b].tolist() for a, b in zip(file.offsets[:-1], file.offsets[1:], strict=True)]
        assert pieces == expected
        assert len(file) == manifest[split]["tokens"] == sum(map(len, expected))
        assert manifest[split]["documents"] == len(texts) > 0
        assert manifest[split]["sha256"] == sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
    train = TokenFile.open(folder, "train", manifest).tokens
    counts = np.load(folder / "counts.npy")
    assert (counts == np.bincount(train, minlength=vocab_size)).all()
    ordinary = np.bincount(train[train > 4])  # ids 0 to 4 are special
    assert unigram_entropy(counts, (0, 1, 2, 3, 4)) == pytest.approx(entropy(ordinary), rel=1e-12)


def test_entropy_of_a_uniform_vocabulary():
    assert unigram_entropy(np.array([7, 3, 3, 3, 3]), special=(0,)) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([7, 0]), special=(0,)) == 0


def test_the_held_out_share_is_kept_and_stable():
    texts = [f"document {i}" for i in range(20_000)]
    held_out = {text for text in texts if is_held_out(text, 5)}
    assert abs(len(held_out) / 20_000 - 0.05) < 0.006  # 4 standard deviations
    assert held_out < {text for text in texts if is_held_out(text, 10)}


def test_arrays_stay_on_the_disk(tmp_path: Path):
    """A million documents are opened without being read, which would take 16 MB."""
    writer = SplitWriter(tmp_path, "train", 10, sentences=True)
    documents = 1_000_000
    writer.add(np.ones(2 * documents, np.uint16), np.full(documents, 2), np.arange(0, 2 * documents, 2))
    manifest = {"dtype": "uint16", "vocab_size": 10, "train": writer.close()}
    tracemalloc.start()
    file = TokenFile.open(tmp_path, "train", manifest)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert all(isinstance(array, np.memmap) for array in (file.tokens, file.offsets, file.sentences))
    assert (len(file), file.offsets[-1], len(file.offsets)) == (2 * documents, 2 * documents, documents + 1)


def test_a_damaged_file_is_refused(tmp_path: Path, documents: list[str], trained):
    manifest = write(tmp_path, documents, trained)
    path = tmp_path / "shard-00000" / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="bytes instead of"):
        TokenFile.open(path.parent, "train", manifest)
