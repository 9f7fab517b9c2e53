"""Documents: cleaning, digests, cutting, sentences, duplicates and leaks, each against a slow reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ds_stacking.data.preparation.documents import clean_text, cut, split_sentences
from ds_stacking.data.preparation.duplicates import DigestSet, NearDuplicates, signatures
from ds_stacking.data.preparation.leaks import LENGTH, find_leak
from ds_stacking.data.preparation.worker import DocumentTokenizer, WorkerConfig
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import text_encoder, train_tokenizer

SETTING = {
    "sep": 3,
    "dtype": "uint16",
    "eval_percent": 5.0,
    "sentences": False,
    "near_duplicates": False,
}
DIRTY = "\ufeffCafe\u0301\u00a0 au\tlait \x00\r\n  next\u200b line\r\r\r\rlast\u00ad one \n"


@cache
def known_tokenizer(documents: tuple[str, ...], lowercase: bool) -> Tokenizer:
    return text_encoder(train_tokenizer(documents[:10], 400, lowercase))


def test_cleaning():
    assert clean_text(DIRTY) == "Caf\u00e9 au lait\nnext line\n\nlast one"


@settings(deadline=None, max_examples=50)  # time on a busy machine proves nothing
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_cleaning_twice_is_cleaning_once(text: str):
    assert clean_text(clean_text(text)) == clean_text(text)


@settings(deadline=None, max_examples=200)  # time on a busy machine proves nothing
@given(text=st.text(st.characters(max_codepoint=127), max_size=80), lowercase=st.booleans())
def test_plain_text_is_tokenised_as_by_the_whole_tokenizer(documents: list[str], text: str, lowercase: bool):
    encoder = known_tokenizer(tuple(documents), lowercase)
    tokenizer = DocumentTokenizer(WorkerConfig(**{**SETTING, "tokenizer": encoder.to_str()}))
    assert tokenizer.has_ascii_encoder
    text = clean_text(text)
    assert tokenizer.encode([text, "caf\u00e9", text]) == [
        encoder.encode(piece, add_special_tokens=False).ids for piece in (text, "caf\u00e9", text)
    ]


def test_long_documents_are_cut():
    text = "one two three\n" * 9 + "x" * 120 + " end"
    pieces = list(cut(text, 50))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 50
    assert pieces[0].endswith("\n") and list(cut("short")) == ["short"]


def test_sentences():
    text = (
        'Mr. Smith paid 3.50 to J. Doe, i.e. nothing. "Why?" he asked. It rained... Then\nit stopped! (So it did.) Ok'
    )
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert [piece.strip() for piece in pieces] == [
        "Mr. Smith paid 3.50 to J. Doe, i.e. nothing.",
        '"Why?" he asked.',
        "It rained...",
        "Then",
        "it stopped!",
        "(So it did.)",
        "Ok",
    ]


@settings(deadline=None)  # time on a busy machine proves nothing
@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=20))
def test_the_first_of_equal_digests_is_new(batches: list[list[int]]):
    known, seen = DigestSet(), set[int]()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in seen)
            seen.add(value)
        assert known.add(np.array(batch, np.uint64)).tolist() == expected
    assert len(known) == len(seen)


def test_near_duplicates(documents: list[str]):
    """The estimated similarity against the true one of the sets of shingles, and what is dropped by it."""

    def shingles(text: str) -> set[str]:
        words = text.lower().split()
        return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}

    whole = documents[0]
    parts = [whole[: len(whole) * share // 10] for share in (10, 9, 5)]
    rows = signatures(parts)
    truth = [len(shingles(whole) & shingles(part)) / len(shingles(whole) | shingles(part)) for part in parts]
    assert [float(np.mean(rows[0] == row)) for row in rows] == pytest.approx(truth, abs=0.13)  # 3 standard deviations
    assert NearDuplicates(0.7).add(rows, np.ones(3, bool)).tolist() == [True, False, True]
    assert NearDuplicates(0.7).add(rows, np.array([False, True, True])).tolist() == [False, True, True]


def test_leaks_against_a_dictionary():
    generator = np.random.default_rng(0)
    train, held_out = generator.integers(5, 4000, (2, 60_000)).astype(np.uint16)
    for array in (train, held_out):
        array[99::100] = 3
    held_out[10_000:25_000] = train[30_000:45_000]
    held_out[40_000:40_050] = train[70:120]  # in train it crosses the end of a document

    def split(tokens: np.ndarray) -> Split:
        offsets = np.arange(0, len(tokens) + 1, 100)
        half = len(tokens) // 2
        return Split(
            files=[
                TokenFile(tokens=tokens[:half], offsets=offsets[: len(offsets) // 2 + 1]),
                TokenFile(tokens=tokens[half:], offsets=offsets[: len(offsets) // 2 + 1]),
            ]
        )

    def ngrams(tokens: np.ndarray) -> list[tuple[int, ...]]:
        rows = tokens.reshape(-1, 100)[:, :-1].tolist()
        return [tuple(row[i : i + LENGTH]) for row in rows for i in range(len(row) - LENGTH + 1)]

    known, wanted = set(ngrams(train)), ngrams(held_out)
    share = sum(ngram in known for ngram in wanted) / len(wanted)
    leak = find_leak(split(train), split(held_out), sep=3)
    assert leak.ngrams == pytest.approx(len(wanted) / 8, rel=0.1)
    assert leak.percent / 100 == pytest.approx(share, abs=0.02) and 0.2 < share < 0.3
    assert leak.leaked_documents == pytest.approx(150, abs=2) and leak.documents == 601
    assert find_leak(split(train), split(generator.integers(5, 4000, 60_000).astype(np.uint16)), sep=3).found == 0
