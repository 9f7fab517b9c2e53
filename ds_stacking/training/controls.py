"""What a model must pass: the losses, on the same held-out [MASK] positions, of two that have no weights.

The unigram knows how often a token stands in the training text. The cache mixes that with how often it stands,
visible, in the same sequence (Kuhn and De Mori 1990, "A cache-based natural language model for speech recognition");
their one weight is fitted on training text. A model above the first knows less than frequencies; one above the second
may do no more with its context than repeat what stands there.

Shapes: P positions, N tokens of some sequences, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ds_stacking.data.batches import Batch, EvalBatches

_SEQUENCES_AT_ONCE = 256
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Controls:
    """Mean cross entropy in nats per held-out [MASK] position, as `HeldOutLoss.masked`."""

    unigram_cross_entropy: float
    """Of the unigram."""
    cache_loss: float
    """Of the mixture with the cache."""
    cache_weight: float
    """The cache's share in it."""


def measure_controls(held_out: EvalBatches, train: EvalBatches, unigram: np.ndarray) -> Controls:
    """Fit the weight on sequences of the training split, masked like the held-out ones, and measure on the latter.

    `unigram` [V] are the probabilities of all tokens, above 0 for ordinary ones and 0 for special ones. No rank needs
    another for it, and every one gets the same.
    """
    weight = fit_weight(*_probabilities(train, unigram))
    by_unigram, by_cache = _probabilities(held_out, unigram)
    mixed = (1 - weight) * by_unigram + weight * by_cache
    return Controls(
        unigram_cross_entropy=float(-np.log(by_unigram).mean()),
        cache_loss=float(-np.log(mixed).mean()),
        cache_weight=weight,
    )


def fit_weight(by_unigram: np.ndarray, by_cache: np.ndarray) -> float:
    """The share of the cache, in [0, 1), that makes the mixture's loss least; both probabilities are [P].

    The loss is convex in it, so halving finds where its slope changes sign.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        weight = (low + high) / 2
        rises = np.sum((by_cache - by_unigram) / ((1 - weight) * by_unigram + weight * by_cache)) < 0
        low, high = (low, weight) if rises else (weight, high)
    return low


def _probabilities(batches: EvalBatches, unigram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the unigram and the cache alone give the right token at each [MASK] position, [P] each."""
    parts = [_of_batch(batch, unigram) for batch in _in_parts(batches)]
    by_unigram, by_cache = (np.concatenate(part) for part in zip(*parts, strict=True))
    return by_unigram, by_cache


def _in_parts(batches: EvalBatches) -> Iterator[Batch]:
    for begin in range(0, len(batches), _SEQUENCES_AT_ONCE):
        yield batches.batch(np.arange(begin, min(begin + _SEQUENCES_AT_ONCE, len(batches))))


def _of_batch(batch: Batch, unigram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for one batch.

    The cache holds what the model sees of its sequence: no special token, so nothing behind a [MASK], and at the other
    predicted positions the random token that stands there, or the one that was left. Where it holds nothing it says
    what the unigram says.
    """
    ids = batch.input_ids.numpy().ravel()  # [N]
    sequences = _sequences(batch)
    visible = unigram[ids] > 0
    of_mask = batch.is_mask.numpy()
    positions, labels = batch.masked_positions.numpy()[of_mask], batch.labels.numpy()[of_mask]  # [P]
    seen = np.sort(sequences[visible] * len(unigram) + ids[visible])
    wanted = sequences[positions] * len(unigram) + labels
    times = np.searchsorted(seen, wanted, side="right") - np.searchsorted(seen, wanted)
    lengths = np.bincount(sequences[visible], minlength=sequences[-1] + 1)[sequences[positions]]
    by_unigram = unigram[labels]
    return by_unigram, np.where(lengths > 0, times / np.maximum(lengths, 1), by_unigram)


def _sequences(batch: Batch) -> np.ndarray:
    """The number of the sequence that each token can see, [N]: its row, or with documents apart its document."""
    count = batch.input_ids.numel()
    if batch.cu_seqlens is None:
        return np.arange(count) // batch.input_ids.shape[1]
    return np.searchsorted(batch.cu_seqlens.numpy()[1:], np.arange(count), side="right")
