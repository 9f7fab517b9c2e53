"""The learning rate of each arm: tried at rates a factor of 1.5 apart, on seeds of its own, at a budget of 1.

An arm tries the recipe's rate and its two neighbours, then goes on while the best lies at an edge. The seeds are none
of those that count, so what is chosen is not measured on what it was chosen by. Arms from scratch have the rate of
their budget of 1 at all budgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FACTOR = 1.5
"""Between two rates."""
FIRST_SEED = 100_000
"""What a comparison's first seed is raised by for its tuning."""
MOST_RATES = 9
"""Rates of an arm, at most."""


def tuning_seeds(first: int, count: int) -> list[int]:
    """Seeds of the tuning, none of which counts in the comparison."""
    return [FIRST_SEED + first + i for i in range(count)]


def first_rates(lr: float) -> list[float]:
    """The rates that an arm begins with, lowest first."""
    return [rounded(lr / FACTOR), lr, rounded(lr * FACTOR)]


def rounded(lr: float) -> float:
    """A rate with four digits, so that its name in a path is the rate."""
    return float(f"{lr:.4g}")


def mean_loss(losses: Sequence[float | None]) -> float:
    """Mean over seeds; infinite where one diverged, since a rate at which that happens is none to choose."""
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known and len(known) == len(losses) else math.inf


def next_rate(losses: Mapping[float, float]) -> float | None:
    """The rate to try next; None once the best lies between two others, or nothing more is to be had.

    Args:
        losses: Mean loss by rate, infinite for a rate that failed.
    """
    rates = sorted(losses)
    best = chosen(losses)
    if best is None or len(rates) >= MOST_RATES:
        # all failed: only a lower rate can help
        return rounded(rates[0] / FACTOR) if len(rates) < MOST_RATES else None
    if best == rates[0]:
        return rounded(best / FACTOR)
    if best == rates[-1]:
        return rounded(best * FACTOR)
    return None


def chosen(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest loss, the lower of two alike; None where every rate failed."""
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda lr: (finite[lr], lr), default=None)


def label(lr: float) -> str:
    """What a run of the tuning is called."""
    return f"lr{lr:g}"
