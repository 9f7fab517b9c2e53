"""Masking for masked language modelling, a whole batch in one vectorised call.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3.1: a share of the tokens is
predicted; of these 80 % are replaced by [MASK], 10 % by a random token, 10 % are kept. Here the share is exact in
every block, and random tokens are ordinary ones.

Shapes: B blocks of a batch, T tokens of a block, M masked positions of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_stacking.data.random_numbers import below, random_bits
from ds_stacking.data.tokenizer import SpecialIds

_MASKED_SHARE = np.uint64(int(0.8 * 2**32))
_CHANGED_SHARE = np.uint64(int(0.9 * 2**32))
_LAST = np.uint64(2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A masked batch."""

    input_ids: np.ndarray
    """[B, T] int64"""
    positions: np.ndarray
    """Flat indices b * T + t of the tokens to predict, ascending, [M] int64."""
    labels: np.ndarray
    """The tokens that stood there, [M] int64."""
    is_mask: np.ndarray
    """Whether the input there is [MASK], [M] bool."""


class Masker:
    """Masks round(rate * n) of the n ordinary tokens of each block, chosen uniformly.

    The choice in a block is a pure function of the block's key.
    """

    def __init__(self, *, rate: float, special: SpecialIds, vocab_size: int) -> None:
        self._rate, self._mask_id = rate, special.mask
        self._is_ordinary = np.ones(vocab_size, bool)
        self._is_ordinary[list(special.every)] = False
        self._ordinary_ids = np.flatnonzero(self._is_ordinary)

    def mask(self, input_ids: np.ndarray, keys: np.ndarray) -> Masked:
        """Mask a copy of blocks `input_ids` [B, T] int64, with one key per block, [B] uint64."""
        ordinary = self._is_ordinary[input_ids]  # [B, T]
        chosen = self._choose(ordinary, random_bits(keys, np.array([0])))
        positions = np.flatnonzero(chosen)
        labels = input_ids.ravel()[positions]

        action_keys = np.repeat(random_bits(keys, np.array([1])), np.count_nonzero(chosen, axis=1))  # [M]
        bits = random_bits(action_keys, positions % input_ids.shape[1])
        action = bits & np.uint64(2**32 - 1)  # the other half of the bits picks the random token
        is_mask = action < _MASKED_SHARE
        random_ids = self._ordinary_ids[below(bits, len(self._ordinary_ids))]
        replaced = np.where(action < _CHANGED_SHARE, random_ids, labels)
        output = input_ids.copy()
        output.ravel()[positions] = np.where(is_mask, self._mask_id, replaced)
        return Masked(input_ids=output, positions=positions, labels=labels, is_mask=is_mask)

    def shuffle(self, input_ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return a copy of blocks [B, T] whose ordinary tokens are permuted at random inside their block."""
        ordinary = self._is_ordinary[input_ids]
        bits = random_bits(random_bits(keys, np.array([2]))[:, None], np.arange(input_ids.shape[1]))
        order = np.argsort(np.where(ordinary, bits, _LAST), axis=1, kind="stable")  # ordinary tokens first, shuffled
        is_token = np.arange(input_ids.shape[1]) < np.count_nonzero(ordinary, axis=1)[:, None]
        output = input_ids.copy()
        output[ordinary] = np.take_along_axis(input_ids, order, axis=1)[is_token]
        return output

    def _choose(self, ordinary: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return where to mask, [B, T] bool: the tokens with the smallest random numbers of their block.

        Under one key no two positions have the same number, so the count is exact.
        """
        numbers = random_bits(keys[:, None], np.arange(ordinary.shape[1]))  # [B, T]
        numbers[~ordinary] = _LAST
        counts = np.rint(self._rate * np.count_nonzero(ordinary, axis=1)).astype(np.int64)  # [B]
        threshold = np.take_along_axis(np.sort(numbers, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)
        return (numbers <= threshold) & ordinary & (counts > 0)[:, None]
