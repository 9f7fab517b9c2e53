"""Masking for masked language modelling, a whole batch in one vectorised call.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3.1: a share of the tokens is
predicted; of these 80 % are replaced by [MASK], 10 % by a random token, 10 % are kept. Here random tokens are ordinary
ones. What is chosen together is a token, a whole word (BERT's later release) or a span of words (Joshi et al. 2020,
"SpanBERT", section 3.1).

Shapes: B sequences of a batch, T tokens of a sequence, M masked positions of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_stacking.data.random_numbers import below, random_bits
from ds_stacking.data.tokenizer import SpecialIds

Unit = Literal["token", "word", "span"]
LONGEST_SPAN = 10
"""Words of a span at most."""

_SPAN_END = 0.2
"""Lengths are geometric with this parameter, longer ones left out: 3.80 words in the mean, as SpanBERT says. To take
longer ones for spans of LONGEST_SPAN would make it 4.46."""
_SPAN_LENGTHS = 1 + np.floor(
    np.log(1 - (np.arange(4096) + 0.5) / 4096 * (1 - (1 - _SPAN_END) ** LONGEST_SPAN)) / np.log(1 - _SPAN_END)
).astype(np.int8)
"""The length of a span by 12 random bits."""
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
    """Masks about rate * n of the n ordinary tokens of each sequence, chosen uniformly.

    The choice in a sequence is a pure function of its key. With the unit `token` the number is round(rate * n); with
    `word` and `span` words stay whole, and the last one is taken if half of it or more is within the number.
    Tokens of a span are replaced all in the same way.
    """

    def __init__(
        self, *, special: SpecialIds, vocab_size: int, unit: Unit = "token", continues: np.ndarray | None = None
    ) -> None:
        """`continues` [vocab_size] bool tells the tokens that go on with a word; words and spans need it."""
        assert unit == "token" or continues is not None, "words are known by the tokens that continue them"
        self._mask_id, self._unit, self._continues, self.vocab_size = special.mask, unit, continues, vocab_size
        self._is_ordinary = np.ones(vocab_size, bool)
        self._is_ordinary[list(special.all_ids)] = False
        self._ordinary_ids = np.flatnonzero(self._is_ordinary)

    def mask(self, input_ids: np.ndarray, keys: np.ndarray, rates: np.ndarray | float) -> Masked:
        """Mask a copy of `input_ids` [B, T] int64, with one key per sequence, [B] uint64, and rate, [B] or one."""
        ordinary = self._is_ordinary[input_ids]  # [B, T]
        counts = np.rint(rates * np.count_nonzero(ordinary, axis=1)).astype(np.int64)  # [B]
        unit_keys = random_bits(keys, np.array([0]))
        if self._unit == "token":
            numbers = random_bits(
                unit_keys[:, None], np.arange(ordinary.shape[1])
            )  # [B, T], no two of a sequence equal
            numbers[~ordinary] = _LAST
            chosen = _smallest(numbers, ordinary, counts)
        else:
            words = self._words(input_ids, ordinary)
            numbers = self._numbers(ordinary, words, unit_keys)
            chosen = _smallest_whole(numbers, words, ordinary, counts)
        positions = np.flatnonzero(chosen)
        labels = input_ids.ravel()[positions]

        action_keys = np.repeat(random_bits(keys, np.array([1])), np.count_nonzero(chosen, axis=1))  # [M]
        bits = random_bits(action_keys, positions % input_ids.shape[1])
        # the upper half of the bits picks the random token, the lower half, or the span's number, what is done
        actions = random_bits(numbers.ravel()[positions], np.array([0])) if self._unit == "span" else bits
        action = actions & np.uint64(2**32 - 1)
        is_mask = action < _MASKED_SHARE
        random_ids = self._ordinary_ids[below(bits, len(self._ordinary_ids))]
        replaced = np.where(action < _CHANGED_SHARE, random_ids, labels)
        output = input_ids.copy()
        output.ravel()[positions] = np.where(is_mask, self._mask_id, replaced)
        return Masked(input_ids=output, positions=positions, labels=labels, is_mask=is_mask)

    def shuffle(self, input_ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return a copy of sequences [B, T] whose ordinary tokens are permuted at random inside their sequence."""
        ordinary = self._is_ordinary[input_ids]
        bits = random_bits(random_bits(keys, np.array([2]))[:, None], np.arange(input_ids.shape[1]))
        order = np.argsort(np.where(ordinary, bits, _LAST), axis=1, kind="stable")  # ordinary tokens first, shuffled
        is_token = np.arange(input_ids.shape[1]) < np.count_nonzero(ordinary, axis=1)[:, None]
        output = input_ids.copy()
        output[ordinary] = np.take_along_axis(input_ids, order, axis=1)[is_token]
        return output

    def _words(self, input_ids: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
        """The word of every token, counted in its sequence, [B, T] int64; what is special is a word by itself."""
        assert self._continues is not None
        starts = ~(self._continues[input_ids] & ordinary)
        starts[:, 1:] |= ~ordinary[:, :-1]
        return np.cumsum(starts, axis=1) - starts[:, :1]

    def _numbers(self, ordinary: np.ndarray, words: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A random number for every token, [B, T] uint64, the same in a word or span; what is special comes last."""
        numbers = random_bits(keys[:, None], np.arange(ordinary.shape[1]))  # [B, T], of words
        is_word = np.zeros_like(ordinary)
        np.put_along_axis(is_word, words, ordinary, axis=1)
        numbers[~is_word] = _LAST
        if self._unit == "span":
            numbers = _spread(numbers, is_word, keys)
        return np.take_along_axis(numbers, words, axis=1)


def _spread(numbers: np.ndarray, is_word: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Give every word, [B, W], the smallest number of the spans that cover it; a span ends before what is no word."""
    bits = random_bits(numbers ^ keys[:, None], np.array([1])) >> np.uint64(32)
    lengths = _SPAN_LENGTHS[(bits >> np.uint64(20)).astype(np.int64)]
    alive, smallest = is_word.copy(), numbers.copy()
    for distance in range(1, LONGEST_SPAN):
        alive = alive[:, :-1] & (lengths[:, :-distance] > distance) & is_word[:, distance:]  # by the span's beginning
        covered = smallest[:, distance:]
        np.minimum(covered, np.where(alive, numbers[:, :-distance], _LAST), out=covered)
    return smallest


def _threshold(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The `counts`-th smallest number of each sequence, [B, 1]."""
    return np.take_along_axis(np.sort(numbers, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)


def _smallest(numbers: np.ndarray, ordinary: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Choose the tokens with the `counts` [B] smallest numbers of their sequence, all different, [B, T] bool."""
    return (numbers <= _threshold(numbers, counts)) & ordinary & (counts > 0)[:, None]


def _smallest_whole(numbers: np.ndarray, words: np.ndarray, ordinary: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Choose words by ascending number up to `counts` [B] tokens, the last one if half of it or more is within."""
    threshold = _threshold(numbers, counts)
    chosen = (numbers < threshold) & ordinary
    last = (numbers == threshold) & ordinary  # the tokens of the last word or span
    left = counts - np.count_nonzero(chosen, axis=1)  # [B]; at least 1 where there is anything to choose
    order = np.cumsum(last, axis=1, dtype=np.int32)
    within = last & (order <= left[:, None])
    place = np.argmax(within & (order == left[:, None]), axis=1)  # where the count is reached
    in_word = (words == np.take_along_axis(words, place[:, None], axis=1)) & last
    inside, size = np.count_nonzero(in_word & within, axis=1), np.count_nonzero(in_word, axis=1)
    taken = np.where(in_word, (2 * inside >= size)[:, None], within)
    return (chosen | taken) & (counts > 0)[:, None]
