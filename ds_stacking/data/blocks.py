"""Blocks: rows of T token ids cut from the flat stream, plain or as BERT's sentence pairs.

Shapes: B blocks of a batch, T tokens of a block, C ordinary places of a block, S documents or pieces of such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ds_stacking.config import UserError
from ds_stacking.data.random_numbers import below, random_bits
from ds_stacking.data.token_file import Split
from ds_stacking.data.tokenizer import SpecialIds


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Unmasked blocks."""

    input_ids: np.ndarray
    """[B, T] int64"""
    token_type_ids: np.ndarray | None = None
    """[B, T] int64: 0 in segment A, 1 in segment B; None for plain blocks."""
    next_sentence_labels: np.ndarray | None = None
    """[B] int64: 0 where B follows A, else 1, as in Hugging Face's models; None for plain blocks."""
    cu_seqlens: np.ndarray | None = None
    """Where documents begin among the B*T tokens, each block's start included, then B*T: [S + 1] int32; None where
    a block is one sequence."""


class BlockReader:
    """Cuts consecutive blocks from the shards of a split.

    A plain block is [CLS] and the next C = T - 2 tokens of the stream and [SEP]. The blocks of a shard hold every one
    of its tokens exactly once, except for fewer than C at its end.

    With `next_sentence` a block is [CLS] A [SEP] B [SEP] with C = T - 3: A is the first part of the next C tokens,
    between a quarter and three quarters of them. In half of the blocks B is the rest of them, in the others it comes
    from another block drawn at random (Devlin et al. 2019, section 3.1, task 2). Where the split knows its sentences,
    A ends with one and B begins with one, if any begins there; else they are pieces of the stream. The end of a
    document, a [SEP], may fall inside either. An epoch shows every A part once, but not every B part.

    With `separate_documents` plain blocks come with the bounds of the documents inside them.
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
        """Raise UserError if the split is shorter than one block, or than two for sentence pairs."""
        assert not (next_sentence and separate_documents), "sentence pairs reach over documents"
        self.sequence_length, self.next_sentence = sequence_length, next_sentence
        self._cls, self._sep = special.cls, special.sep
        self._places = sequence_length - (3 if next_sentence else 2)
        files = [file for file in split.files if len(file) >= self._places]
        self._ends = np.cumsum([len(file) // self._places for file in files])  # of the shards, in blocks
        self._count = int(self._ends[-1]) if files else 0
        least = 2 if next_sentence else 1
        if self._count < least:
            raise UserError(
                f"{len(split)} tokens make fewer than {least} blocks of {sequence_length}; "
                f"give more documents or shorten corpus.sequence_length."
            )
        self._windows = [sliding_window_view(np.asarray(file.tokens), self._places) for file in files]  # [.., C]
        self._sentences = [file.sentences for file in files]
        self._offsets = [file.offsets for file in files] if separate_documents else None

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray, keys: np.ndarray) -> Blocks:
        """Return blocks by index, [B] int64; `keys` [B] uint64 decide the sentence pairs and nothing else."""
        if self.next_sentence:
            return self._read_pairs(indices, keys)
        input_ids = np.empty((len(indices), self.sequence_length), np.int64)  # [B, T]
        input_ids[:, 0] = self._cls
        input_ids[:, 1:-1] = self._gather(indices, np.zeros_like(indices))
        input_ids[:, -1] = self._sep
        return Blocks(input_ids=input_ids, cu_seqlens=self._document_bounds(indices))

    def _document_bounds(self, indices: np.ndarray) -> np.ndarray | None:
        """Bounds of blocks and of the documents inside them; [CLS] belongs to the first document of its block."""
        if self._offsets is None:
            return None
        bounds = [np.arange(len(indices) + 1) * self.sequence_length]
        for file, chosen, inside in self._by_file(indices):
            offsets = self._offsets[file]
            begin = inside * self._places  # of the blocks, in the shard
            first = np.searchsorted(offsets, begin, side="right")
            counts = np.searchsorted(offsets, begin + self._places, side="left") - first
            block = np.repeat(np.arange(len(inside)), counts)
            which = np.arange(len(block)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
            bounds.append(offsets[which] - begin[block] + 1 + chosen[block] * self.sequence_length)
        return np.unique(np.concatenate(bounds)).astype(np.int32)

    def _read_pairs(self, indices: np.ndarray, keys: np.ndarray) -> Blocks:
        label_bits, other_bits, length_bits = (random_bits(keys, np.array([draw])) for draw in range(3))
        labels = (label_bits >> np.uint64(63)).astype(np.int64)  # [B]
        others = (indices + 1 + below(other_bits, self._count - 1)) % self._count  # never the block itself
        quarter = self._places // 4
        lengths = quarter + below(length_bits, self._places - 2 * quarter + 1)  # [B], of A
        lengths = self._to_sentence(indices, lengths, quarter, self._places - quarter)
        jumps = self._to_sentence(others, lengths, 0, self._places) - lengths
        first = self._gather(indices, np.zeros_like(indices))
        second = np.where(labels[:, None] == 1, self._gather(others, jumps), first)
        in_second = np.arange(self._places) >= lengths[:, None]  # [B, C]

        rows = np.arange(len(indices))
        input_ids = np.empty((len(indices), self.sequence_length), np.int64)  # [B, T]
        input_ids[:, 0], input_ids[:, -1] = self._cls, self._sep
        input_ids[:, 1:-2] = first
        np.copyto(input_ids[:, 2:-1], second, where=in_second)
        input_ids[rows, lengths + 1] = self._sep
        token_type_ids = (np.arange(self.sequence_length) > lengths[:, None] + 1).astype(np.int64)
        return Blocks(input_ids=input_ids, token_type_ids=token_type_ids, next_sentence_labels=labels)

    def _to_sentence(self, indices: np.ndarray, places: np.ndarray, least: int, most: int) -> np.ndarray:
        """Move a place in each block, [B], to the first sentence that begins there or later, else before, in range."""
        moved = places.copy()
        for file, chosen, inside in self._by_file(indices):
            starts = self._sentences[file]
            if starts is None or not len(starts):
                continue
            begin = inside * self._places
            after = np.searchsorted(starts, begin + places[chosen])
            for candidates in (after - 1, after):  # the later one wins
                there = starts[np.clip(candidates, 0, len(starts) - 1)].astype(np.int64) - begin
                moved[chosen] = np.where((least <= there) & (there <= most), there, moved[chosen])
        return moved

    def _gather(self, indices: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """The tokens of blocks, [B, C], each read `shifts` [B] tokens later, as far as the shard goes."""
        if len(self._windows) == 1:
            return self._windows[0][self._clip(0, indices, shifts)]
        tokens = np.empty((len(indices), self._places), self._windows[0].dtype)
        for file, chosen, inside in self._by_file(indices):
            tokens[chosen] = self._windows[file][self._clip(file, inside, shifts[chosen])]
        return tokens

    def _clip(self, file: int, inside: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        return np.clip(inside * self._places + shifts, 0, len(self._windows[file]) - 1)

    def _by_file(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each shard that holds some of the blocks: its number, which they are, and their numbers inside."""
        if len(self._ends) == 1:
            yield 0, np.arange(len(indices)), indices
            return
        owners = np.searchsorted(self._ends, indices, side="right")
        for file in np.unique(owners):
            chosen = np.flatnonzero(owners == file)
            yield int(file), chosen, indices[chosen] - (self._ends[file - 1] if file else 0)
