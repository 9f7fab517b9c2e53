"""Statistics of a comparison, as pure functions: interpolation, paired t-intervals, Holm's correction, seeds needed.

All values are differences seed by seed, since equal seeds mean equal data. An interval is Student's at 95 %, of the
mean of n values that are taken to be independent and normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Level of the intervals."""
POINTS = 0.05
"""Half of an interval of a saving that would be narrow enough: 5 percentage points."""
MOST_SEEDS = 10**6
"""Where more seeds than that would be needed, no number is given."""
TOLERANCE = 0.1
"""Runs of one shape whose seconds differ by more from their median, relatively, did not run undisturbed."""
Frontier = Sequence[tuple[float, float]]
"""Cost and loss of scratch's ends with one seed, by rising cost."""
Hole = Literal["failed", "missing"]
"""Why there is no run where one is needed: it failed, or has not finished."""
Place = Literal["inside", "below", "above", "not falling", "missing", "failed"]
"""Where a loss lies beside a frontier; `missing`: fewer than two ends; `not falling`: more cost did not
help; or there is a hole."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A quantity over seeds: paired differences, or shares of a cost."""

    values: Mapping[int, float | None]
    """By seed; None where scratch's ends do not enclose it, or where `holes` names the seed."""
    left_out: Sequence[int] = ()
    """Seeds whose times cannot be used, whatever they say."""
    holes: Mapping[int, Hole] = field(default_factory=dict)
    """Seeds of which a run is lacking."""
    mean: float | None = None
    """Mean; None where any seed has no value, since leaving seeds out by their result would flatter."""
    deviation: float | None = None
    """Standard deviation over seeds; None with fewer than two."""
    low: float | None = None
    """Lower end of the t-interval; None with fewer than two seeds, and where all values are equal."""
    high: float | None = None
    """Its upper end."""
    p: float | None = None
    """Two-sided p-value of a mean of 0; None where there is no interval."""

    @property
    def n(self) -> int:
        """Seeds that have a value."""
        return sum(value is not None for value in self.values.values())

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and 0 lies outside."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def effect(
    values: Mapping[int, float | None], left_out: Sequence[int] = (), holes: Mapping[int, Hole] | None = None
) -> Effect:
    """Mean and t-interval of values by seed; the seeds of `holes` have none, so with one of them there is no mean."""
    holes = holes or {}
    values = dict(sorted({**values, **dict.fromkeys(holes)}.items()))
    found = Effect(values=values, left_out=left_out, holes=holes)
    known = [value for value in values.values() if value is not None]
    if not known or len(known) < len(values):
        return found
    mean = float(np.mean(known))
    if len(known) < 2:
        return replace(found, mean=mean)
    deviation = float(np.std(known, ddof=1))
    if np.ptp(known) == 0:  # a width of 0 would be a claim of certainty
        return replace(found, mean=mean, deviation=0.0)
    half = half_width(deviation, len(known))
    p = float(2 * stats.t.sf(abs(mean) / (deviation / math.sqrt(len(known))), len(known) - 1))
    return replace(found, mean=mean, deviation=deviation, low=mean - half, high=mean + half, p=p)


def half_width(deviation: float, n: int) -> float:
    """Half of the t-interval of the mean of `n` values with this standard deviation."""
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)


def seeds_needed(deviation: float, half: float = POINTS) -> int | None:
    """The smallest n of two or more whose interval is +-`half` or narrower; None for more than MOST_SEEDS."""
    # t is larger than the normal quantile, so no smaller n than with that will do
    least = (stats.norm.ppf((1 + LEVEL) / 2) * deviation / half) ** 2
    if least > MOST_SEEDS:
        return None
    n = max(2, math.floor(least))
    while half_width(deviation, n) > half:
        n += 1
    return n


def loss_at(frontier: Frontier, cost: float) -> float | None:
    """Scratch's loss at a cost, linear in the logarithm of the cost between two ends; None outside its budgets."""
    for (low, first), (high, last) in pairwise(frontier):
        if low <= cost <= high:
            return first + (last - first) * math.log(cost / low) / math.log(high / low) if high > low else first
    return None


def place_of(frontier: Frontier, loss: float) -> Place:
    """Where a loss lies beside scratch's ends."""
    losses = [end for _, end in frontier]
    if len(losses) < 2:
        return "missing"
    if not is_falling(losses):
        return "not falling"
    return "below" if loss < losses[-1] else "above" if loss > losses[0] else "inside"


def is_falling(losses: Sequence[float]) -> bool:
    """Whether each is lower than the one before."""
    return all(last < first for first, last in pairwise(losses))


def cost_at(frontier: Frontier, loss: float) -> float | None:
    """What scratch spends to reach a loss, or None where its ends do not enclose it or do not fall."""
    if place_of(frontier, loss) != "inside":
        return None
    for (low, first), (high, last) in pairwise(frontier):
        if last <= loss <= first:
            return low * (high / low) ** ((first - loss) / (first - last))
    raise AssertionError("a loss inside lies between two ends")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those below 0.05 errs anywhere in the family with at most 5 %."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def deviation_of(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None with fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def off_median(value: float, peers: Sequence[float]) -> float:
    """How far a value lies from the median of its peers, itself among them, relative to that median."""
    return value / median(peers) - 1


def is_beaten(advantage: Effect, spread: float | None) -> bool | None:
    """Whether one arm beats another by more than the spread of the seeds; None where that cannot be told.

    Args:
        advantage: Paired differences, positive where it does.
        spread: The larger of both arms' standard deviations over seeds.

    True where the mean is larger than the spread and the interval lies above 0; False where the whole interval lies
    below the spread, so that the advantage, if there is one, is smaller; None between the two.
    """
    if spread is None or advantage.mean is None or advantage.low is None or advantage.high is None:
        return None
    if advantage.mean > spread and advantage.low > 0:
        return True
    return False if advantage.high < spread else None
