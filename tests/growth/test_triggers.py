"""Triggers: their notation, and their arithmetic against published figures and closed forms."""

from __future__ import annotations

import math

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


def test_a_plateau_is_a_small_slope_of_the_later_lines() -> None:
    falling = [(math.exp(i / 10), 8 * math.exp(-0.05 * i / 10)) for i in range(40)]  # a power law of FLOPs
    assert loss_slope(falling) == pytest.approx(-0.05)
    assert not has_plateaued(falling, 0.04) and has_plateaued(falling, 0.0575)
    steep_then_flat = falling[:20] + [(math.exp(i / 10), 7.2 - 0.001 * i) for i in range(20, 40)]
    assert has_plateaued(steep_then_flat, 0.01)
    assert not has_plateaued(steep_then_flat[20:32], 0.01), "six lines tell nothing"


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
