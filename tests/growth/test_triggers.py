"""Triggers: their notation, and their arithmetic against published figures and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.growth.triggers import (
    Trigger,
    gstack_tokens,
    has_plateaued,
    loss_slope,
    parse_trigger,
    steps_by_amount,
    steps_by_prop,
    without_spikes,
)


def test_the_notation_is_read() -> None:
    assert parse_trigger("steps") == Trigger(kind="steps")
    assert parse_trigger("tokens:1e9,3e9").numbers == (1e9, 3e9)
    assert parse_trigger("prop:0").numbers == (0.0,)
    trial = parse_trigger("trial:stack,interleave[1:-1]+noise:0.1:20")
    assert (trial.operators, trial.numbers) == (("stack", "interleave[1:-1]+noise:0.1"), (20.0,))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("platau:1", "is unknown"),
        ("steps:3", "takes no number"),
        ("gstack:1", "takes no number"),
        ("tokens", "needs numbers"),
        ("tokens:many", "needs numbers"),
        ("flops:inf", "needs numbers"),
        ("tokens:3e9,1e9", "must rise"),
        ("plateau:1,2", "needs one number"),
        ("plateau:0", "must be positive"),
        ("prop:-1", "must be positive"),
        ("trial:stack", "two to four operators"),
        ("trial:stack,interleave", "two to four operators"),
        ("trial:stack,stack:5", "two to four operators"),
        ("trial:stack,interleave:0", "two to four operators"),
        ("trial:stack,middel:5", "did you mean middle"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse_trigger(text)


def test_amounts_become_steps_counted_from_the_start() -> None:
    assert steps_by_amount([1000, 3000], [100, 200, 400], last=7) == [10, 10, 7]
    assert steps_by_amount([1001], [100, 100], last=7) == [11, 7], "a growth comes once the amount is reached"
    with pytest.raises(UserError, match="3 stages have 2 growths"):
        steps_by_amount([1000], [100, 200, 400], last=7)


def test_prop_shares_the_steps_by_powers() -> None:
    assert steps_by_prop(600, 3, 1) == [100, 200, 300]
    assert steps_by_prop(1400, 3, 2) == [100, 400, 900]
    assert steps_by_prop(10, 3, 0) == [3, 4, 3]


def test_gstack_times_bert_base_where_the_paper_of_stacking_grew_it() -> None:
    """For 0.11 B parameters and 49 B tokens 5.1 B tokens: 50,000 updates of 102,400, as Gong et al. publish."""
    assert gstack_tokens(0.11e9, 49e9) == pytest.approx(5.1e9, rel=0.02)


THRESHOLD = 0.0575
NOISE = 0.0025
"""Of held-out losses of the quickstart (2 layers, constant rate), relative: 0.0023 measured over 43 evaluations, 20
steps apart, without correlation; a training loss over 10 of its steps has TRAINING."""
TRAINING = 0.0105
STEPS = np.arange(60, 901, 20)
"""Evaluations of a stage of 900 steps after 50 of warm-up; FLOPs are in proportion."""
CURVES = 200


def simulated(exponent: float, seed: int, *, noise: float = NOISE, kept: float = 0.0, flat_from: int = 10**9) -> list:
    """A power law of FLOPs with noise, from a step on flat; `kept` is the correlation of neighbours' noise."""
    generator = np.random.default_rng(seed)
    fresh, noises = generator.standard_normal(len(STEPS)), []
    for value in fresh:
        noises.append(value if not noises else kept * noises[-1] + np.sqrt(1 - kept**2) * value)
    losses = 8 * np.minimum(STEPS, flat_from) ** -exponent * np.exp(noise * np.array(noises))
    return list(zip((1e9 * STEPS).tolist(), losses.tolist(), strict=True))


def fires_at(points: list, rule: Callable[[list], bool]) -> int | None:
    """The step after whose evaluation the rule fires first."""
    return next((int(step) for count, step in enumerate(STEPS, 1) if rule(points[:count])), None)


def share(rule: Callable[[list], bool], exponent: float, **curve: Any) -> float:
    """Of the simulated curves, those on which the rule fires at any time."""
    return float(np.mean([fires_at(simulated(exponent, seed, **curve), rule) is not None for seed in range(CURVES)]))


def rule(points: list) -> bool:
    return has_plateaued(points, THRESHOLD, must_fall=True)


def slope_alone(points: list) -> bool:
    """The slope of the later half of the points, by itself: what a rule without errors does."""
    later = np.log(np.array(points[len(points) // 2 :]))
    return len(later) >= 8 and np.polyfit(*later.T, 1)[0] > -THRESHOLD


def test_noise_does_not_end_a_stage() -> None:
    """Exponents above the threshold are no plateau; docs/growth.md tells these rates."""
    assert share(slope_alone, 0.08, noise=TRAINING) > 0.3, "the simulation would not find the fault"
    assert share(rule, 0.06) < 0.05
    assert share(rule, 0.08) == 0
    assert share(rule, 0.08, noise=TRAINING) < 0.05
    assert share(rule, 0.07, kept=0.5) < 0.05


def test_a_plateau_is_found_soon() -> None:
    """Flat from step 300: at 1.6 times as many steps at the latest, in 95 of 100 curves, and never before."""
    found = [fires_at(simulated(0.1, seed, flat_from=300), rule) for seed in range(CURVES)]
    assert None not in found
    assert np.quantile(found, 0.95) <= 1.6 * 300 and min(found) > 300


def test_a_plateau_is_a_small_slope_of_the_later_evaluations() -> None:
    falling = [(math.exp(i / 10), 8 * math.exp(-0.05 * i / 10)) for i in range(40)]  # a power law of FLOPs
    assert loss_slope(falling) == pytest.approx((-0.05, 0))
    assert not has_plateaued(falling, 0.04, must_fall=False) and has_plateaued(falling, 0.0575, must_fall=False)
    assert not has_plateaued(falling, 0.0575, must_fall=True), "a loss that never fell faster has not begun to fall"
    assert not has_plateaued(falling[:14], 0.0575, must_fall=False), "seven evaluations tell nothing"
    points = simulated(0.1, 1, flat_from=300)
    x, y = np.log(np.array(points)).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert loss_slope(points) == pytest.approx((slope, covariance[0, 0] ** 0.5))


def test_spikes_do_not_count_and_a_lasting_rise_does() -> None:
    losses = [5.0, 4.9, 9.0, 4.8, 4.84, 6.0, 6.0, 5.9]
    assert [loss for _, loss in without_spikes([(1.0, loss) for loss in losses])] == [5, 4.9, 4.8, 4.84, 6, 5.9]
    points = simulated(0.1, 1, flat_from=300)
    clean = fires_at(points, rule)
    points[-10] = (points[-10][0], 3 * points[-10][1])
    assert clean is not None and fires_at(points, rule) == clean


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ("plateau:nan", "needs numbers"),
        ("plateau:" + LONG, "needs numbers"),
        ("plateau:" + "1" * 100_000 + "x", "needs numbers"),
        ("tokens:1_000,2_000", "needs numbers"),
        ("tokens:١", "needs numbers"),
        ("tokens:" + ",".join("1" * 100_000), "must rise"),
        ("prop:1e300", "exponent must be at most 20"),
        ("trial:stack,interleave:" + LONG, "write two to four operators"),
        ("trial:stack,interleave:٣", "write two to four operators"),
        ("trial:stack,interleave:1000000", "write two to four operators"),
        ("gstak", "did you mean gstack"),
        ("x" * 100_000, "is unknown"),
    ],
)
def test_notation_without_bounds_is_refused_in_one_short_sentence(trigger, message):
    with pytest.raises(UserError, match=message) as error:
        parse_trigger(trigger)
    assert len(str(error.value)) < 300


def test_steps_that_no_run_makes_are_refused():
    with pytest.raises(UserError, match="means 1e[+]308 steps of a stage"):
        steps_by_amount([1e308], [1, 1], 3)
