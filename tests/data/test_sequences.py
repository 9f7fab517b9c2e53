"""Sequences and sentence pairs against a slow reading of the stream, place by place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stacking.common.errors import UserError
from ds_stacking.data.random_numbers import derive_keys
from ds_stacking.data.sequences import SequenceReader
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SpecialIds

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, all_ids=(0, 1, 2, 3, 4))


def numbered(length: int) -> Split:
    """A stream in which every token tells its own place: 5, 6, 7, ..."""
    tokens = np.arange(5, length + 5, dtype=np.uint32)
    return Split(files=[TokenFile(tokens=tokens, offsets=np.array([0, length]))])


def read(length: int, sequence_length: int, next_sentence: bool = False, seed: int = 0):
    reader = SequenceReader(
        numbered(length), sequence_length=sequence_length, special=SPECIAL, next_sentence=next_sentence
    )
    indices = np.arange(len(reader))
    return reader.read(indices, derive_keys(seed, 0, indices))


@settings(deadline=None)  # time on a busy machine proves nothing
@given(length=st.integers(6, 500), sequence_length=st.integers(8, 40))
def test_blocks_hold_every_token_once_up_to_the_last_partial_sequence(length: int, sequence_length: int):
    places = sequence_length - 2
    if length < places:
        with pytest.raises(UserError, match="fewer than 1 sequences"):
            read(length, sequence_length)
        return
    input_ids = read(length, sequence_length).input_ids
    assert (input_ids[:, 0] == 2).all() and (input_ids[:, -1] == 3).all()
    content = input_ids[:, 1:-1].ravel()
    assert content.tolist() == list(range(5, 5 + len(content)))
    assert length - len(content) < places


@settings(deadline=None)  # time on a busy machine proves nothing
@given(length=st.integers(60, 900), sequence_length=st.integers(8, 30), seed=st.integers(0, 1000))
def test_pairs(length: int, sequence_length: int, seed: int):
    sequences = read(length, sequence_length, next_sentence=True, seed=seed)
    assert sequences.token_type_ids is not None and sequences.next_sentence_labels is not None
    places = sequence_length - 3
    for i, (row, types, label) in enumerate(
        zip(
            sequences.input_ids.tolist(),
            sequences.token_type_ids.tolist(),
            sequences.next_sentence_labels,
            strict=True,
        )
    ):
        middle = row.index(3)
        first, second = row[1:middle], row[middle + 1 : -1]
        assert row[0] == 2 and row[-1] == 3 and row.count(3) == 2
        assert types == [0] * (middle + 1) + [1] * (sequence_length - middle - 1)
        assert places // 4 <= len(first) <= places - places // 4
        start = 5 + i * places
        assert first == list(range(start, start + len(first)))
        assert second == list(range(second[0], second[0] + len(second)))
        assert (second[0] == start + len(first)) == (label == 0)


def test_half_of_the_pairs_follow_each_other():
    labels = read(21 * 10_000, 24, next_sentence=True).next_sentence_labels
    assert labels is not None and abs(labels.mean() - 0.5) < 0.02  # 4 standard deviations


@settings(deadline=None)  # time on a busy machine proves nothing
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5), sequence_length=st.integers(8, 20), data=st.data()
)
def test_shards_are_read_one_behind_another(lengths: list[int], sequence_length: int, data: st.DataObject):
    """Every token of a shard once, but for fewer than a sequence's at its end; none reaches into the next shard."""
    places = sequence_length - 2
    ends = np.cumsum(lengths)
    shards = [np.arange(end - size, end, dtype=np.uint32) + 5 for end, size in zip(ends, lengths, strict=True)]
    split = Split(files=[TokenFile(tokens=tokens, offsets=np.array([0, len(tokens)])) for tokens in shards])
    expected = [shard[i : i + places].tolist() for shard in shards for i in range(0, len(shard) - places + 1, places)]
    if not expected:
        return
    reader = SequenceReader(split, sequence_length=sequence_length, special=SPECIAL)
    indices = np.array(data.draw(st.permutations(range(len(expected)))))
    sequences = reader.read(indices, derive_keys(0, 0, indices))
    assert sequences.input_ids[:, 1:-1].tolist() == [expected[i] for i in indices]


@pytest.mark.parametrize("shards", [1, 3])
def test_pairs_meet_at_sentences(shards: int):
    """Sentences of 5 tokens begin at multiples of 5: A ends and B begins there; another's B follows nothing."""
    files = [
        TokenFile(tokens=np.arange(5, 605, dtype=np.uint32), offsets=np.array([0, 600]), sentences=sentences)
        for sentences in [np.arange(0, 600, 5, dtype=np.uint32)] * shards
    ]
    reader = SequenceReader(Split(files=files), sequence_length=43, special=SPECIAL, next_sentence=True)
    indices = np.arange(len(reader))
    sequences = reader.read(indices, derive_keys(1, 0, indices))
    assert sequences.next_sentence_labels is not None
    assert len(reader) == 15 * shards and set(sequences.next_sentence_labels) == {0, 1}
    for row, label in zip(sequences.input_ids.tolist(), sequences.next_sentence_labels, strict=True):
        middle = row.index(3)
        first, second = row[1:middle], row[middle + 1 : -1]
        assert first == list(range(first[0], first[0] + len(first)))
        assert second == list(range(second[0], second[0] + len(second)))
        assert (first[0] - 5) % 40 == 0 and (second[0] == first[-1] + 1) == (label == 0)
        clipped = second[-1] == 604  # a shard's end leaves no room
        assert first[-1] % 5 == 4 and (second[0] % 5 == 0 or clipped)


def test_pairs_need_two_sequences():
    with pytest.raises(UserError, match="fewer than 2 sequences"):
        read(25, 16, next_sentence=True)


@settings(deadline=None)  # time on a busy machine proves nothing
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), sequence_length=st.integers(8, 40), data=st.data()
)
def test_document_bounds_are_those_of_the_stream(lengths: list[int], sequence_length: int, data: st.DataObject):
    """Every token is told its document place by place; bounds lie exactly where it changes, and at sequence starts."""
    offsets = np.cumsum([0, *lengths])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    places = sequence_length - 2
    if offsets[-1] < places:
        return
    tokens = np.arange(5, offsets[-1] + 5, dtype=np.uint32)
    stream = Split(files=[TokenFile(tokens=tokens, offsets=offsets)])
    reader = SequenceReader(stream, sequence_length=sequence_length, special=SPECIAL, separate_documents=True)
    indices = np.array(data.draw(st.lists(st.integers(0, len(reader) - 1), min_size=1, max_size=5)))
    sequences = reader.read(indices, derive_keys(0, 0, indices))
    want = []
    for row, index in enumerate(indices):
        sequence = owner[index * places : (index + 1) * places]
        tokens = [sequence[0], *sequence, sequence[-1]]  # [CLS] and [SEP] belong to their neighbours
        want += [row * sequence_length + t for t in range(sequence_length) if not t or tokens[t] != tokens[t - 1]]
    assert sequences.cu_seqlens is not None and sequences.cu_seqlens.dtype == np.int32
    assert sequences.cu_seqlens.tolist() == [*want, len(indices) * sequence_length]


def test_blocks_are_one_sequence_unless_asked_otherwise():
    assert read(100, 12).cu_seqlens is None


def documents_of(lengths: list[int], sentences: bool, known: bool) -> tuple[Split, np.ndarray]:
    """A stream in which every token tells its own place, and the document of each place."""
    ends = np.cumsum(lengths)
    starts = np.unique(np.concatenate([np.arange(0, ends[-1], 4), ends[:-1]])).astype(np.uint32) if sentences else None
    tokens = np.arange(5, ends[-1] + 5, dtype=np.uint32)
    file = TokenFile(tokens=tokens, offsets=np.concatenate(([0], ends if known else ends[-1:])), sentences=starts)
    return Split(files=[file]), np.repeat(np.arange(len(lengths)), lengths)


def crossings(lengths: list[int], sentences: bool, key: int, known: bool = True) -> tuple[int, int, int]:
    """Pairs, segments with tokens of two documents, and pairs said to follow whose seam is a document's end."""
    split, owner = documents_of(lengths, sentences, known)
    reader = SequenceReader(split, sequence_length=19, special=SPECIAL, next_sentence=True)
    indices = np.arange(len(reader))
    sequences = reader.read(indices, derive_keys(key, 0, indices))
    assert sequences.next_sentence_labels is not None
    mixed = seams = 0
    for row, label in zip(sequences.input_ids.tolist(), sequences.next_sentence_labels, strict=True):
        middle = row.index(3)
        first, second = np.array(row[1:middle]) - 5, np.array(row[middle + 1 : -1]) - 5
        parts = [first, second] if label else [np.concatenate((first, second))]
        mixed += sum(len(set(owner[part])) > 1 for part in parts)
        if not label:
            assert second[0] == first[-1] + 1 and 16 // 4 <= len(first) <= 16 - 16 // 4 + 1
            seams += owner[first[-1]] != owner[second[0]]
    return len(indices), mixed, seams


@pytest.mark.parametrize("sentences", [False, True])
def test_pairs_stay_inside_documents(sentences: bool):
    """With documents of a sequence or more no pair crosses an end; of shorter ones none meets at one."""
    rng = np.random.default_rng(0)
    for key in range(5):
        long, short = rng.integers(16, 90, 60).tolist(), rng.integers(2, 12, 300).tolist()
        assert crossings(long, sentences, key)[1:] == (0, 0)
        assert crossings(short, sentences, key)[2] == 0


def test_the_test_of_documents_sees_pairs_that_cross():
    """Of a reader that is not told where documents end."""
    rng = np.random.default_rng(0)
    assert crossings(rng.integers(16, 90, 60).tolist(), False, 0, known=False)[1] > 5
    assert crossings(rng.integers(2, 12, 300).tolist(), True, 0, known=False)[2] > 5
