"""The choice of a learning rate: between two others, by seeds of its own, none at which a seed diverges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ds_stacking.studies.comparison.tuning import (
    FACTOR,
    MOST_RATES,
    chosen,
    first_rates,
    label,
    mean_loss,
    next_rate,
    tuning_seeds,
)


def search(loss: Callable[[float], float], lr: float) -> dict[float, float]:
    """The rates that a tuning tries, and their losses."""
    losses = {rate: loss(rate) for rate in first_rates(lr)}
    while (rate := next_rate(losses)) is not None:
        assert rate not in losses
        losses[rate] = loss(rate)
    return losses


@pytest.mark.parametrize("best", [1e-4, 1.1e-3, 2e-3, 3.1e-3, 8e-3])
def test_the_best_is_never_at_the_edge(best: float) -> None:
    losses = search(lambda lr: math.log(lr / best) ** 2, 2e-3)
    rates = sorted(losses)
    found = chosen(losses)
    assert found is not None
    if len(rates) < MOST_RATES:
        assert rates[0] < found < rates[-1]
        assert abs(math.log(found / best)) <= math.log(FACTOR) / 2 + 1e-3
    assert all(b / a == pytest.approx(FACTOR, rel=1e-3) for a, b in zip(rates, rates[1:], strict=False))
    assert len({label(rate) for rate in rates}) == len(rates) and all(float(label(rate)[2:]) == rate for rate in rates)


def test_a_rate_at_which_one_seed_diverges_is_none_to_choose() -> None:
    assert mean_loss([1.0, 3.0]) == 2.0
    assert mean_loss([1.0, None]) == mean_loss([]) == math.inf
    losses = search(lambda lr: math.inf if lr > 2e-3 else -lr, 2e-3)
    assert chosen(losses) == 2e-3 and len(losses) == 3
    losses = search(lambda lr: math.inf if lr > 1e-3 else math.log(lr / 5e-4) ** 2, 2e-3)
    assert abs(math.log((chosen(losses) or 0) / 5e-4)) <= math.log(FACTOR) / 2


def test_where_all_diverge_it_ends() -> None:
    losses = search(lambda lr: math.inf, 2e-3)
    assert chosen(losses) is None and len(losses) == MOST_RATES


def test_its_seeds_are_none_that_count() -> None:
    assert not set(tuning_seeds(1, 5)) & set(range(1, 1001))
    assert tuning_seeds(1, 0) == []
