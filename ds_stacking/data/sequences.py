"""Sequences: rows of T token ids cut from the flat stream, plain or as BERT's sentence pairs.

Shapes: B sequences of a batch, T tokens of a sequence, C ordinary places of a sequence, S documents or pieces of such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ds_stacking.common.errors import UserError
from ds_stacking.data.random_numbers import below, random_bits
from ds_stacking.data.token_file import Split
from ds_stacking.data.tokenizer import SpecialIds


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Unmasked sequences."""

    input_ids: np.ndarray
    """[B, T] int64"""
    token_type_ids: np.ndarray | None = None
    """[B, T] int64: 0 in segment A, 1 in segment B; None for plain sequences."""
    next_sentence_labels: np.ndarray | None = None
    """[B] int64: 0 where B follows A, else 1, as in Hugging Face's models; None for plain sequences."""
    cu_seqlens: np.ndarray | None = None
    """Where documents begin among the B*T tokens, each sequence's start included, then B*T: [S + 1] int32; None where
    a sequence is attended to whole."""


class SequenceReader:
    """Cuts consecutive sequences from the shards of a split.

    A plain sequence is [CLS] and the next C = T - 2 tokens of the stream and [SEP]. The sequences of a shard hold
    every one of its tokens exactly once, except for fewer than C at its end.

    With `next_sentence` a sequence is [CLS] A [SEP] B [SEP] with C = T - 3: A is the first part of the next C tokens,
    between a quarter and three quarters of them. In half of the sequences B is the rest of them, in the others it
    comes from another sequence drawn at random (Devlin et al. 2019, section 3.1, task 2). Where sentences are known, A
    ends with one and B begins with one, if any begins there; else they are pieces of the stream. Where a document
    ends inside those C tokens they are moved into one of the two, each with the probability of its share, so that A
    and what follows it come from one document. Documents of fewer than C tokens have no room for that: their ends, a
    [SEP], may fall inside A or B, but never between them where B follows. An epoch shows every A part once, but for
    those that were moved, and not every B part.

    With `separate_documents` plain sequences come with the bounds of the documents inside them.
    """

    def __init__(
        self,
        split: Split,
        *,
        sequence_length: int,
        special: SpecialIds,
        next_sentence: bool = False,
        separate_documents: bool = False,
    ) -> None:
        """Raise UserError if the split is shorter than one sequence, or than two for sentence pairs."""
        assert not (next_sentence and separate_documents), "sentence pairs reach over documents"
        self.sequence_length, self.next_sentence = sequence_length, next_sentence
        self._cls, self._sep = special.cls, special.sep
        self._places = sequence_length - (3 if next_sentence else 2)
        files = [file for file in split.files if len(file) >= self._places]
        counts = np.array([len(file) // self._places for file in files], np.int64)
        self._ends = np.cumsum(counts)  # of the shards, in sequences
        self._count = int(counts.sum())
        least = 2 if next_sentence else 1
        if self._count < least:
            raise UserError(
                f"{len(split)} tokens make fewer than {least} sequences of {sequence_length}; "
                f"give more documents or shorten corpus.sequence_length."
            )
        self._starts = self._ends - counts
        self._windows = [sliding_window_view(np.asarray(file.tokens), self._places) for file in files]  # [.., C]
        self._last = np.array([len(windows) - 1 for windows in self._windows])
        self._sentences = [file.sentences for file in files]
        self._separate = separate_documents
        self._offsets = [file.offsets for file in files]

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray, keys: np.ndarray) -> Sequences:
        """Return sequences by index, [B] int64; `keys` [B] uint64 decide the sentence pairs and nothing else."""
        if self.next_sentence:
            return self._read_pairs(indices, keys)
        input_ids = np.empty((len(indices), self.sequence_length), np.int64)  # [B, T]
        input_ids[:, 0] = self._cls
        shards, begins = self._locate(indices)
        input_ids[:, 1:-1] = self._gather(shards, begins)
        input_ids[:, -1] = self._sep
        return Sequences(input_ids=input_ids, cu_seqlens=self._document_bounds(shards, begins))

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sequence and where in its tokens the sequence begins, [B] and [B] int64."""
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, (indices - self._starts[shards]) * self._places

    def _by_shard(self, shards: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each shard that holds some of the sequences: its number and which they are."""
        order = np.argsort(shards, kind="stable")
        for chosen in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            yield int(shards[chosen[0]]), chosen

    def _gather(self, shards: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """The C tokens from each place on, [B, C]; from a little earlier where the shard ends before."""
        begins = np.minimum(np.maximum(begins, 0), self._last[shards])
        if len(self._windows) == 1:
            return self._windows[0][begins]
        tokens = np.empty((len(begins), self._places), self._windows[0].dtype)
        for shard, chosen in self._by_shard(shards):
            tokens[chosen] = self._windows[shard][begins[chosen]]
        return tokens

    def _document_bounds(self, shards: np.ndarray, begins: np.ndarray) -> np.ndarray | None:
        """Bounds of sequences and of the documents inside them; [CLS] belongs to the first document after it."""
        if not self._separate:
            return None
        bounds = [np.arange(len(shards) + 1) * self.sequence_length]
        for shard, chosen in self._by_shard(shards):
            offsets, begin = self._offsets[shard], begins[chosen]
            first = np.searchsorted(offsets, begin, side="right")
            counts = np.searchsorted(offsets, begin + self._places, side="left") - first
            counts = np.clip(counts, 0, self._places)  # made-up offsets need not ascend
            sequence = np.repeat(np.arange(len(begin)), counts)
            which = np.arange(len(sequence)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
            inside = np.clip(offsets[which] - begin[sequence], 0, self._places - 1)
            bounds.append(inside + 1 + chosen[sequence] * self.sequence_length)
        return np.unique(np.concatenate(bounds)).astype(np.int32)

    def _read_pairs(self, indices: np.ndarray, keys: np.ndarray) -> Sequences:
        label_bits, other_bits, length_bits = (random_bits(keys, np.array([draw])) for draw in range(3))
        labels = (label_bits >> np.uint64(63)).astype(np.int64)  # [B]
        others = (indices + 1 + below(other_bits, self._count - 1)) % self._count  # never the sequence itself
        quarter = self._places // 4
        lengths = quarter + below(length_bits, self._places - 2 * quarter + 1)  # [B], of A
        random = np.flatnonzero(labels)
        # A's sequences, then those of other Bs
        shards, begins = self._locate(np.concatenate((indices, others[random])))
        begins = self._into_documents(
            shards, begins, random_bits(np.concatenate((keys, ~keys[random])), np.array([3]))
        )
        size, places = len(indices), np.concatenate((lengths, lengths[random]))
        least = np.repeat([quarter, 0], [size, len(random)])
        most = np.concatenate((np.full(size, self._places - quarter), lengths[random]))  # B ends with its C tokens
        places = self._to_sentence(shards, begins, places, least, most)
        lengths = self._off_document_starts(shards[:size], begins[:size], places[:size])
        places[size:] -= lengths[random]
        places[:size] = 0
        content = self._gather(shards, begins + places)
        first, second = content[:size], content[:size].copy()
        second[random] = content[size:]
        in_second = np.arange(self._places) >= lengths[:, None]  # [B, C]

        rows = np.arange(len(indices))
        input_ids = np.empty((len(indices), self.sequence_length), np.int64)  # [B, T]
        input_ids[:, 0], input_ids[:, -1] = self._cls, self._sep
        input_ids[:, 1:-2] = first
        np.copyto(input_ids[:, 2:-1], second, where=in_second)
        input_ids[rows, lengths + 1] = self._sep
        token_type_ids = (np.arange(self.sequence_length) > lengths[:, None] + 1).astype(np.int64)
        return Sequences(input_ids=input_ids, token_type_ids=token_type_ids, next_sentence_labels=labels)

    def _into_documents(self, shards: np.ndarray, begins: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Move the C tokens from each place on, [B], into the document of one of them drawn at random, if it has C."""
        moved = begins.copy()
        drawn = begins + below(bits, self._places)
        for shard, chosen in self._by_shard(shards):
            offsets = self._offsets[shard]
            document = np.clip(np.searchsorted(offsets, drawn[chosen], side="right") - 1, 0, len(offsets) - 2)
            first, last = offsets[document], offsets[document + 1] - self._places
            inside = np.minimum(np.maximum(begins[chosen], first), last)
            moved[chosen] = np.where(first <= last, inside, begins[chosen])
        return moved

    def _off_document_starts(self, shards: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A's lengths, [B], one more where A would end with its document and B begin with the next."""
        lengths = lengths.copy()
        for shard, chosen in self._by_shard(shards):
            offsets, seams = self._offsets[shard], (begins + lengths)[chosen]
            place = np.minimum(np.searchsorted(offsets, seams), len(offsets) - 1)
            lengths[chosen[offsets[place] == seams]] += 1
        return lengths

    def _to_sentence(
        self, shards: np.ndarray, begins: np.ndarray, places: np.ndarray, least: np.ndarray, most: np.ndarray
    ) -> np.ndarray:
        """Move a place in each sequence, [B], to the next sentence's beginning, else the last one's, within range."""
        if all(starts is None for starts in self._sentences):
            return places.copy()
        before, after = np.full_like(begins, -1), np.full_like(begins, -1)
        for shard, chosen in self._by_shard(shards):
            starts = self._sentences[shard]
            if starts is not None and len(starts):
                there = np.searchsorted(starts, (begins + places)[chosen].astype(starts.dtype))
                before[chosen] = starts[np.maximum(there - 1, 0)]
                after[chosen] = starts[np.minimum(there, len(starts) - 1)]
        moved = places
        for found in (before - begins, after - begins):  # the later one wins
            moved = np.where((least <= found) & (found <= most), found, moved)
        return moved


def read_mixed(
    readers: Sequence[SequenceReader], sources: np.ndarray, indices: np.ndarray, keys: np.ndarray
) -> Sequences:
    """Read sequences by source and index, [B] int64 each, from readers of one sequence length."""
    if len(readers) == 1:
        return readers[0].read(indices, keys)
    rows, parts = [], []
    for source in np.unique(sources):
        rows.append(np.flatnonzero(sources == source))
        parts.append(readers[source].read(indices[rows[-1]], keys[rows[-1]]))
    order = np.argsort(np.concatenate(rows))

    def join(name: str) -> np.ndarray | None:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else np.concatenate(pieces)[order]

    input_ids = join("input_ids")
    assert input_ids is not None
    return Sequences(
        input_ids=input_ids,
        token_type_ids=join("token_type_ids"),
        next_sentence_labels=join("next_sentence_labels"),
        cu_seqlens=_join_bounds(rows, parts, input_ids.shape[1]),
    )


def _join_bounds(rows: Sequence[np.ndarray], parts: Sequence[Sequences], length: int) -> np.ndarray | None:
    """The bounds of documents of all parts, each sequence moved to its row."""
    bounds = []
    for of_part, part in zip(rows, parts, strict=True):
        if part.cu_seqlens is None:
            return None
        sequence, place = np.divmod(part.cu_seqlens[:-1], length)
        bounds.append(of_part[sequence] * length + place)
    end = sum(map(len, rows)) * length
    return np.append(np.sort(np.concatenate(bounds)), end).astype(np.int32)
