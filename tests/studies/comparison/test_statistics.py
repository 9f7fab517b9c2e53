"""Statistics of a comparison against scipy, closed forms and simulation."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ds_stacking.studies.comparison.effects import depth_pays, gain, saving
from ds_stacking.studies.comparison.results import End, Results
from ds_stacking.studies.comparison.statistics import (
    cost_at,
    deviation_of,
    effect,
    holm,
    is_beaten,
    loss_at,
    place_of,
    seeds_needed,
)
from tests.studies.comparison.made_up import ARMS, plan

FRONTIER = [(70.0, 3.0), (100.0, 2.5), (140.0, 2.3)]


def of_values(*values: float | None) -> dict[int, float | None]:
    return dict(enumerate(values, 1))


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_intervals_are_those_of_the_paired_t_test(n: int) -> None:
    first, second = np.random.default_rng(n).normal(size=(2, n))
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    found = effect(of_values(*(first - second).tolist()))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.mean, found.p) == pytest.approx(((first - second).mean(), test.pvalue))
    assert found.n == n and found.excludes_zero == (test.pvalue < 0.05)


def test_no_interval_is_claimed_where_there_is_none() -> None:
    assert effect(of_values(0.1, None)).mean is None, "leaving a seed out would flatter"
    assert effect(of_values(0.1)).low is None and effect({}).mean is None
    same = effect(of_values(0.1, 0.1, 0.1))
    assert same.mean == pytest.approx(0.1) and same.low is None and not same.excludes_zero, "no width of 0"


def test_interpolation_is_linear_in_the_logarithm_of_the_cost() -> None:
    for cost in (70.0, 80.0, 100.0, 123.0, 140.0):
        expected = np.interp(math.log(cost), [math.log(c) for c, _ in FRONTIER], [loss for _, loss in FRONTIER])
        assert loss_at(FRONTIER, cost) == pytest.approx(expected)
        assert cost_at(FRONTIER, float(expected)) == pytest.approx(cost)
    assert loss_at(FRONTIER, 69) is None and loss_at(FRONTIER, 141) is None


@pytest.mark.parametrize(
    ("frontier", "loss", "place"),
    [
        (FRONTIER, 2.75, "inside"),
        (FRONTIER, 3.0, "inside"),
        (FRONTIER, 2.3, "inside"),
        (FRONTIER, 3.001, "above"),
        (FRONTIER, 2.299, "below"),
        ([(70.0, 3.0), (100.0, 3.1), (140.0, 2.3)], 2.75, "not falling"),
        ([(70.0, 3.0), (100.0, 3.0), (140.0, 2.3)], 2.75, "not falling"),
        (FRONTIER[:1], 3.0, "missing"),
        ([], 3.0, "missing"),
    ],
)
def test_the_place_of_a_loss_beside_scratch(frontier: list[tuple[float, float]], loss: float, place: str) -> None:
    assert place_of(frontier, loss) == place
    assert (cost_at(frontier, loss) is not None) == (place == "inside")


@pytest.mark.parametrize("deviation", [0.01, 0.0402, 0.086, 0.2, 1.0])
def test_seeds_needed_is_the_smallest_number(deviation: float) -> None:
    wide = [n for n in range(2, 2000) if stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n) <= 0.05]
    assert seeds_needed(deviation) == wide[0]
    assert seeds_needed(1e39) is None


def test_holm_is_the_stepdown_procedure() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    rejected = set()
    for rank, (p, index) in enumerate(sorted((p, i) for i, p in enumerate(p_values))):
        if p > 0.05 / (len(p_values) - rank):
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected == {0, 3}
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.8, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "spread", "expected"),
    [
        ((0.10, 0.12, 0.11, 0.09, 0.13), 0.05, True),
        ((0.10, 0.12, 0.11, 0.09, 0.13), 0.111, None),  # the interval reaches above the spread
        ((0.10, 0.12, 0.11, 0.09, 0.13), 0.13, False),  # all of it lies below the spread
        ((-0.10, -0.12, -0.11, -0.09, -0.13), 0.05, False),
        ((-0.3, 0.3, 0.5, -0.2, 0.6), 0.05, None),  # wide
        ((0.3,), 0.05, None),
        ((), None, None),
        ((0.1, 0.1, 0.1), 0.05, None),  # by no chance
        ((0.1, 0.12, 0.11), None, None),
    ],
)
def test_depth_pays_where_the_mean_exceeds_the_spread_and_the_interval_lies_above_0(
    values: tuple[float, ...], spread: float | None, expected: bool | None
) -> None:
    assert is_beaten(effect(of_values(*values)), spread) is expected


def simulated(
    rng: random.Random,
    seeds: int,
    losses: dict[str, float],
    noise: float,
    shared: float = 0.03,
    frontier_noise: float | None = None,
) -> Results:
    """A comparison whose arms end at known losses, and scratch on a known line; noise of seeds and of runs."""
    made = plan(arms=ARMS, seeds=range(1, seeds + 1))
    results = Results(folder=Path(), plan=made)  # type: ignore[arg-type]
    for seed in range(1, seeds + 1):
        common = rng.gauss(0, shared)
        for path in [path for path in made["runs"] if path.endswith(f"/seed-{seed}")]:
            name, label, _ = path.split("/")
            units = float(label[1:]) if name == "scratch" else 1.0
            own = rng.gauss(0, noise if name != "scratch" or frontier_noise is None else frontier_noise)
            loss = losses[name] - 0.5 * math.log(units) + common + own
            totals = {"steps": 1, "tokens": units, "flops": units, "wall_seconds": units, "cpu_seconds": units}
            results.ends.append(
                End(arm=name, label=label, seed=seed, loss=loss, seconds=units, data="abc", **totals)  # type: ignore[arg-type]
            )
    return results


def test_intervals_cover_the_truth_in_95_of_100_comparisons() -> None:
    rng, truth, runs = random.Random(1), 0.05, 2000
    losses = {"scratch": 5.7, "shallow_1": 6.0, "shallow_2": 5.9, "stack": 5.7 - truth}
    gains = savings = known = 0
    for _ in range(runs):
        results = simulated(rng, 5, losses, noise=0.015)
        found = gain(results, "stack", "flops")
        assert found.low is not None and found.high is not None
        gains += found.low <= truth <= found.high
        saved = saving(results, "stack", "flops")
        if saved.low is not None and saved.high is not None:
            known += 1
            savings += saved.low <= 1 - math.exp(-truth / 0.5) <= saved.high
    assert 0.93 <= gains / runs <= 0.97
    assert known > 0.9 * runs and 0.93 <= savings / known <= 0.97


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("advantage", "wrong"),
    [(0.0, True), (-0.02, True), (0.12, False), (-0.3, True), (0.3, False)],
    ids=["as good", "a little better", "worse", "far better", "far worse"],
)
def test_the_rule_of_depth_errs_in_less_than_5_of_100(seeds: int, advantage: float, wrong: bool) -> None:
    """With shallow arms as good or better it must not say that depth pays, with both worse not that it does not."""
    rng = random.Random(seeds)
    losses = {"scratch": 5.7, "shallow_1": 5.7 + advantage, "shallow_2": 5.7 + advantage, "stack": 5.7}
    said = [depth_pays(simulated(rng, seeds, losses, noise=0.03)) for _ in range(500)]
    assert said.count(wrong) / len(said) < 0.05
    if abs(advantage) == 0.3:
        assert said.count(not wrong) / len(said) > 0.9, "what is plain is seen"


def test_deviation_of_one_value_is_not_known() -> None:
    assert deviation_of([1.0]) is None and deviation_of([1.0, 3.0]) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("power", "least", "most"), [(0.3, 0.003, 0.004), (0.5, 0.005, 0.006)])
def test_the_line_between_two_budgets_adds_to_a_saving_what_the_documentation_says(
    power: float, least: float, most: float
) -> None:
    budgets = np.array([0.5, 0.7, 1.0, 1.4])
    frontier = [(float(c), 3 + 1.5 * float(c) ** -power) for c in budgets]
    for saved in (0.1, 0.15, 0.2):
        needed = cost_at(frontier, 3 + 1.5 * (1 / (1 - saved)) ** -power)
        assert needed is not None and least <= round(1 - 1 / needed - saved, 3) <= most


@pytest.mark.parametrize(("shift", "least", "most"), [(0.5, 0.002, 0.004), (0.75, 0.005, 0.01)])
def test_a_rate_kept_from_one_unit_adds_to_a_saving_what_the_documentation_says(
    shift: float, least: float, most: float
) -> None:
    """0.02 nats are lost where the rate is off by 1.5, four times that by 2.25; the best one falls as cost^-shift."""
    curvature = 0.02 / np.log(1.5) ** 2
    budgets = (0.5, 0.7, 1.0, 1.4)
    tuned = [(c, 4 + c**-0.5) for c in budgets]
    kept = [(c, loss + float(curvature * (shift * np.log(c)) ** 2)) for c, loss in tuned]
    for saved in (0.1, 0.15, 0.2):
        own = 4 + (1 / (1 - saved)) ** -0.5
        one, other = cost_at(tuned, own), cost_at(kept, own)
        assert one is not None and other is not None and least <= round(1 / one - 1 / other, 3) <= most
