"""Blocks: rows of T token ids cut from the flat stream, plain or as BERT's sentence pairs.

Shapes: B blocks of a batch, T tokens of a block, C ordinary places of a block, S documents or pieces of such.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_stacking.config import UserError
from ds_stacking.data.random_numbers import below, random_bits
from ds_stacking.data.token_file import TokenFile
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
    """Cuts consecutive blocks from a token file.

    A plain block is [CLS] and the next C = T - 2 tokens of the stream and [SEP]. The blocks of a file hold every one
    of its tokens exactly once, except for fewer than C at its end.

    With `next_sentence` a block is [CLS] A [SEP] B [SEP] with C = T - 3: A is the first part of the next C tokens,
    between a quarter and three quarters of them. In half of the blocks B is the rest of them, in the others the same
    part of another block drawn at random (Devlin et al. 2019, section 3.1, task 2). Segments are pieces of the stream:
    the end of a document, a [SEP], may fall inside one. An epoch shows every A part once, but not every B part.

    With `separate_documents` plain blocks come with the bounds of the documents inside them.
    """

    def __init__(
        self,
        token_file: TokenFile,
        *,
        sequence_length: int,
        special: SpecialIds,
        next_sentence: bool = False,
        separate_documents: bool = False,
    ) -> None:
        """Raise UserError if the file is shorter than one block, or than two for sentence pairs."""
        assert not (next_sentence and separate_documents), "sentence pairs reach over documents"
        self._offsets = token_file.offsets if separate_documents else None
        self.sequence_length, self.next_sentence = sequence_length, next_sentence
        self._cls, self._sep = special.cls, special.sep
        self._places = sequence_length - (3 if next_sentence else 2)
        self._count = len(token_file) // self._places
        least = 2 if next_sentence else 1
        if self._count < least:
            raise UserError(
                f"{len(token_file)} tokens make fewer than {least} blocks of {sequence_length}; "
                f"give more documents or shorten corpus.sequence_length."
            )
        used = np.asarray(token_file.tokens[: self._count * self._places])
        self._rows = used.reshape(self._count, self._places)  # [blocks, C]

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray, keys: np.ndarray) -> Blocks:
        """Return blocks by index, [B] int64; `keys` [B] uint64 decide the sentence pairs and nothing else."""
        if self.next_sentence:
            return self._read_pairs(indices, keys)
        input_ids = np.empty((len(indices), self.sequence_length), np.int64)  # [B, T]
        input_ids[:, 0] = self._cls
        input_ids[:, 1:-1] = self._rows[indices]
        input_ids[:, -1] = self._sep
        return Blocks(input_ids=input_ids, cu_seqlens=self._document_bounds(indices))

    def _document_bounds(self, indices: np.ndarray) -> np.ndarray | None:
        """Bounds of blocks and of the documents inside them; [CLS] belongs to the first document of its block."""
        if self._offsets is None:
            return None
        begin = indices * self._places  # [B], in the stream
        first = np.searchsorted(self._offsets, begin, side="right")
        counts = np.searchsorted(self._offsets, begin + self._places, side="left") - first
        block = np.repeat(np.arange(len(indices)), counts)
        which = np.arange(len(block)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        inside = self._offsets[which] - begin[block] + 1 + block * self.sequence_length
        return np.union1d(np.arange(len(indices) + 1) * self.sequence_length, inside).astype(np.int32)

    def _read_pairs(self, indices: np.ndarray, keys: np.ndarray) -> Blocks:
        label_bits, other_bits, length_bits = (random_bits(keys, np.array([draw])) for draw in range(3))
        labels = (label_bits >> np.uint64(63)).astype(np.int64)  # [B]
        others = (indices + 1 + below(other_bits, self._count - 1)) % self._count  # never the block itself
        second = np.where(labels == 1, others, indices)
        quarter = self._places // 4
        lengths = quarter + below(length_bits, self._places - 2 * quarter + 1)  # [B], of A
        place = np.arange(self._places)
        in_first = place < lengths[:, None]  # [B, C]
        content = np.where(in_first, self._rows[indices], self._rows[second])

        rows = np.arange(len(indices))
        input_ids = np.full((len(indices), self.sequence_length), self._sep, np.int64)  # [B, T]
        input_ids[:, 0] = self._cls
        input_ids[rows[:, None], np.where(in_first, place + 1, place + 2)] = content
        token_type_ids = (np.arange(self.sequence_length) > lengths[:, None] + 1).astype(np.int64)
        return Blocks(input_ids=input_ids, token_type_ids=token_type_ids, next_sentence_labels=labels)
