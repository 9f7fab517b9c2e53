"""The lines that a model must pass, against a few plain loops over the same positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import log

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ds_stacking.data.batches import Batch, EvalBatches
from ds_stacking.data.masking import Masker, Unit
from ds_stacking.data.mixture import Mixture
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SpecialIds
from ds_stacking.training import controls
from ds_stacking.training.controls import measure_controls

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, all_ids=(0, 1, 2, 3, 4))
VOCABULARY = 80
CONTINUES = np.arange(VOCABULARY) % 4 == 0


def split(seed: int, topic: int) -> Split:
    """Documents of 20 tokens, each of which uses few tokens again and again: a cache is worth something."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.choice(rng.choice(np.arange(5 + topic, VOCABULARY - 9), 7), 19), 3) for _ in range(200)]
    tokens = np.concatenate(documents).astype(np.uint16)
    return Split(files=[TokenFile(tokens=tokens, offsets=np.arange(0, len(tokens) + 1, 20))])


def mixed(seed: int) -> Mixture:
    return Mixture(splits=[split(seed, 0), split(seed + 1, 40)], weights=[3.0, 1.0])


CASES = {
    "plain": {},
    "mixture": {"mixture": True},
    "documents apart": {"separate_documents": True},
    "sentence pairs": {"next_sentence": True},
    "words": {"unit": "word"},
    "spans": {"unit": "span"},
}


def make(
    *, mixture: bool = False, unit: Unit = "token", **fields: bool
) -> tuple[EvalBatches, EvalBatches, np.ndarray]:
    """Held-out and training blocks, and the unigram, which knows nothing of tokens that the training text lacks."""
    masker = Masker(special=SPECIAL, vocab_size=VOCABULARY, unit=unit, continues=CONTINUES)
    held_out, train = (
        EvalBatches(
            mixed(seed) if mixture else split(seed, 0),
            sequences=blocks, sequence_length=16, masking_rate=0.3, masker=masker, special=SPECIAL, **fields,
        )
        for seed, blocks in ((10, 61), (20, 90))
    )  # fmt: skip
    counts = np.zeros(VOCABULARY)
    for file in split(20, 0).files:
        np.add.at(counts, file.tokens, 1)
    return (
        held_out,
        train,
        np.array([0 if t in SPECIAL.all_ids else counts[t] + 1 for t in range(VOCABULARY)])
        / (sum(counts[t] + 1 for t in range(VOCABULARY) if t not in SPECIAL.all_ids)),
    )


def pairs(batches: EvalBatches, unigram: np.ndarray) -> list[tuple[float, float]]:
    """What unigram and cache say of every [MASK], token by token."""
    found = []
    for index in range(len(batches)):
        batch = batches.batch(np.array([index]))
        ids, bounds = batch.input_ids[0].tolist(), [0, len(batch.input_ids[0])]
        if batch.cu_seqlens is not None:
            bounds = batch.cu_seqlens.tolist()
        for place, label in zip(batch.masked_positions.tolist(), batch.labels.tolist(), strict=True):
            if ids[place] == SPECIAL.mask:
                begin = max(b for b in bounds if b <= place)
                end = min(b for b in bounds if b > place)
                seen = Counter(t for t in ids[begin:end] if t not in SPECIAL.all_ids)
                found.append((unigram[label], seen[label] / seen.total() if seen else unigram[label]))
    return found


def expected(case: str, fitted_on: str = "training text") -> tuple[float, float, float]:
    held_out, train, unigram = make(**CASES[case])
    tested = pairs(held_out, unigram)

    def mean(weight: float, of: list[tuple[float, float]]) -> float:
        return -sum(log((1 - weight) * u + weight * c) for u, c in of) / len(of)

    text = pairs(train, unigram) if fitted_on == "training text" else tested
    weight = minimize_scalar(mean, bounds=(0, 1 - 1e-9), args=(text,), method="bounded", options={"xatol": 1e-9}).x
    return mean(0, tested), mean(weight, tested), weight


def measured(case: str) -> tuple[float, float, float]:
    found = measure_controls(*make(**CASES[case]))
    return found.unigram_cross_entropy, found.cache_loss, found.cache_weight


@pytest.mark.parametrize("case", CASES)
def test_controls_are_what_plain_loops_find(case: str) -> None:
    unigram, cache, weight = measured(case)
    right = expected(case)
    assert unigram == pytest.approx(right[0], rel=1e-12)
    assert cache == pytest.approx(right[1], rel=1e-7) and weight == pytest.approx(right[2], abs=1e-5)
    assert 0.1 < weight < 0.9 and cache < unigram - 0.1, "the corpus is made for it"


def looks_behind(batch: Batch) -> Batch:
    """A batch that shows what stands behind each [MASK], at a place that is not predicted."""
    ids = batch.input_ids.clone().ravel()
    ids[batch.masked_positions] = batch.labels
    return replace(batch, input_ids=ids.view_as(batch.input_ids))


def one_document(batch: Batch) -> Batch:
    """A batch that does not say where its documents end."""
    return replace(batch, cu_seqlens=None)


class Spoilt:
    """Batches with a fault."""

    def __init__(self, batches: EvalBatches, fault: Callable[[Batch], Batch]) -> None:
        self.batches, self.fault = batches, fault

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, indices: np.ndarray) -> Batch:
        return self.fault(self.batches.batch(indices))


@pytest.mark.parametrize(
    "fault", ["fitted on held-out text", "sees what is masked", "counts special tokens", "documents together"]
)
def test_a_fault_is_found(fault: str) -> None:
    """What would make a line too easy or too hard to pass differs from the plain loops by far more than they allow."""
    case = "documents apart" if fault == "documents together" else "plain"
    held_out, train, unigram = make(**CASES[case])
    if fault == "fitted on held-out text":
        train = held_out
        assert expected(case, "held-out text")[1] < expected(case)[1] - 1e-6
    elif fault == "counts special tokens":
        unigram = np.maximum(unigram, 1e-300)
    else:
        spoil = looks_behind if fault == "sees what is masked" else one_document
        held_out, train = Spoilt(held_out, spoil), Spoilt(train, spoil)
    assert abs(measure_controls(held_out, train, unigram).cache_loss - expected(case)[1]) > 1e-6


def test_nothing_seen_and_nothing_to_gain() -> None:
    """Where a sequence shows nothing the cache says what the unigram says; a useless cache gets no weight."""
    held_out, train, unigram = make(separate_documents=True)
    assert controls.fit_weight(np.full(9, 0.5), np.full(9, 0.25)) == 0
    assert controls.fit_weight(np.full(9, 0.25), np.full(9, 0.5)) == pytest.approx(1)
    assert np.isfinite(measure_controls(held_out, train, unigram).cache_loss)
