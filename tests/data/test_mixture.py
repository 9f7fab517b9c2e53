"""Mixtures: exact shares, every sequence of a source once per epoch of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig, SourceConfig
from ds_stacking.data.batches import EvalBatches, MaskedBatches
from ds_stacking.data.masking import Masker
from ds_stacking.data.mixture import Interleaving, Mixture, read_mixture
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.folder import prepare_folder
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SpecialIds, train_tokenizer

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, all_ids=(0, 1, 2, 3, 4))
WEIGHTS = [3.0, 1.0, 0.5]


def stream(first: int, length: int, shards: int) -> Split:
    """Tokens that tell their place, in shards, with a document's bound every 7 tokens."""
    tokens = np.arange(first, first + length, dtype=np.uint32)
    files = [
        TokenFile(tokens=part, offsets=np.unique([*range(0, len(part), 7), len(part)]))
        for part in np.array_split(tokens, shards)
    ]
    return Split(files=files)


def batches(**options: object) -> MaskedBatches:
    splits = [stream(1000, 700, 3), stream(3000, 300, 1), stream(5000, 200, 2)]
    return MaskedBatches(
        Mixture(splits=splits, weights=WEIGHTS),
        sequence_length=16,
        masking_rate=0.15,
        masker=Masker(special=SPECIAL, vocab_size=6000),
        special=SPECIAL,
        seed=1,
        **options,  # type: ignore[arg-type]
    )


@settings(deadline=None)  # time on a busy machine proves nothing
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    start=st.integers(0, 10**12),
    size=st.integers(1, 99),
)
def test_any_stretch_holds_each_source_in_its_share(weights: list[float], start: int, size: int):
    interleaving = Interleaving(weights)
    sources, numbers = interleaving.locate(np.arange(start, start + size))
    for source, share in enumerate(np.array(weights) / sum(weights)):
        of_source = numbers[sources == source]
        assert (np.diff(of_source) == 1).all(), "consecutive samples of a source are numbered consecutively"
        assert abs(len(of_source) - share * size) <= len(weights)
    first, counted = interleaving.locate(np.arange(20_000))
    for source in range(len(weights)):
        assert counted[first == source].tolist() == list(range((first == source).sum())), "counted from 0 with no gap"


def test_a_source_shows_each_of_its_blocks_once_per_epoch():
    mixed = batches()
    sources, sequences = mixed.sequences_of(np.arange(600))
    for source, reader in enumerate(mixed._readers):
        seen = sequences[sources == source]
        assert sorted(seen[: len(reader)]) == list(range(len(reader)))


@pytest.mark.parametrize("options", [{}, {"next_sentence": True}, {"separate_documents": True}], ids=str)
def test_a_sample_is_the_same_in_any_grouping(options: dict[str, bool]):
    mixed = batches(**options)
    whole = mixed.batch(np.arange(10**9, 10**9 + 24))
    for row in range(24):
        alone = mixed.batch(np.array([10**9 + row]))
        assert torch.equal(alone.input_ids[0], whole.input_ids[row])
        if whole.cu_seqlens is not None and alone.cu_seqlens is not None:
            bounds = whole.cu_seqlens - 16 * row
            assert alone.cu_seqlens.tolist() == bounds[(bounds >= 0) & (bounds <= 16)].tolist()


def test_evaluation_blocks_are_shared_out_by_weight():
    splits = [stream(1000, 7000, 3), stream(30_000, 3000, 1), stream(50_000, 2000, 2)]
    masker = Masker(special=SPECIAL, vocab_size=60_000)
    mixture = Mixture(splits=splits, weights=WEIGHTS)
    held_out = EvalBatches(
        mixture, sequences=90, sequence_length=16, masking_rate=0.15, masker=masker, special=SPECIAL
    )
    middles = held_out.batch(np.arange(len(held_out))).input_ids.median(1).values
    assert np.histogram(middles, [0, 30_000, 50_000, 60_000])[0].tolist() == [60, 20, 10]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{}", "is empty; it must be a JSON object"),
        ('{"a": 0}', "a: input should be greater than 0, and is 0"),
        ('{"a": -1}', "a: input should be greater than 0, and is -1"),
        ('{"a": "1"}', "a: input should be a valid number, and is '1'"),
        ('{"a": true}', "a: input should be a valid number, and is True"),
        ('{"a": NaN}', "a: input should be "),
        ('{"a": 1e999}', "a: input should be "),
        ('{"a": 1e300, "b": 1e300}', "a: input should be less than or equal to 1000000000000, and is 1e+300"),
        (f'{{"a": {"9" * 400}}}', "a: input should be "),
        (f'{{"a": {"9" * 5000}}}', "is no JSON"),
        ('{"a": ' * 100_000, "is no JSON"),
        ('{"a": {"b": 1}}', "a: input should be a valid number"),
        ('{"a": 1, "b": 1e-9}', "a share of less than one in 10,000"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ('{"a": 1, "./a": 2}', "names './a' twice"),
        ('{"a\\u0000b": 1}', "names 'a\\x00b', no folder"),
        ('{"~nobody-has-this-name/a": 1}', "cannot be a path"),
        (" " * 2**21, "has more than 1,048,576 bytes"),
        ("{", "is no JSON"),
    ],
)
def test_bad_mixtures_are_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_mixture(tmp_path / "mix.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folders(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Prepared folders by name: two halves of the documents, and one with the first half again in other words."""
    root = tmp_path_factory.mktemp("folders")
    train_tokenizer(documents, 600, True).save_pretrained(str(root / "tokenizer"))
    texts = {"one": documents[:20], "two": documents[20:], "again": ["Once more. " + text for text in documents[:20]]}

    def make(name: str) -> Path:
        if not (root / name).exists():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[name])
            (root / f"{name}.jsonl").write_text(lines)
            prepare_folder(
                PreparationConfig(
                    data=str(root / f"{name}.jsonl"),
                    output_dir=str(root / name),
                    tokenizer=str(root / "tokenizer"),
                    workers=1,
                    max_leak=5.0,
                    corpus=SourceConfig(eval_percent=30),
                ),
                print,
            )
        return root / name

    return make


def test_prepared_folders_are_mixed(folders: Callable[[str], Path], tmp_path: Path):
    one, two = folders("one"), folders("two")
    (tmp_path / "mix.json").write_text(json.dumps({str(one): 3, str(two): 1}))
    config = CorpusConfig(cache_dir=str(tmp_path), sequence_length=32, eval_percent=30)
    data = prepare(str(tmp_path / "mix.json"), "train", config, log=print)
    assert isinstance(data.train, Mixture) and data.train.weights == [3.0, 1.0]
    parts = [prepare(str(folder), "train", config, log=print) for folder in (one, two)]
    assert len(data.train) == sum(len(part.train) for part in parts)
    assert min(p.unigram_entropy for p in parts) < data.unigram_entropy < max(p.unigram_entropy for p in parts) + 1


def test_held_out_text_in_another_part_is_refused(folders: Callable[[str], Path], tmp_path: Path):
    (tmp_path / "mix.json").write_text(json.dumps({str(folders("one")): 1, str(folders("again")): 1}))
    config = CorpusConfig(cache_dir=str(tmp_path), sequence_length=32, eval_percent=30)
    with pytest.raises(UserError, match="stands in the training splits of the other"):
        prepare(str(tmp_path / "mix.json"), "train", config, log=print)
    (tmp_path / "other.json").write_text(json.dumps({str(tmp_path): 1}))
    with pytest.raises(UserError, match=r"is no folder of prepare_data\.py"):
        prepare(str(tmp_path / "other.json"), "train", config, log=print)
