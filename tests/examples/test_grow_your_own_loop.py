"""The example is run as it stands, on two ranks with real engines."""

from __future__ import annotations

import runpy
from pathlib import Path
from statistics import mean

import pytest

from tests.ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "grow_your_own_loop.py"


def run_example() -> tuple[list[float], list[float], int]:
    return runpy.run_path(str(EXAMPLE))["main"]()


@pytest.mark.distributed
def test_the_loss_goes_on_falling_after_the_growth() -> None:
    for before, after, layers in run_ranks(2, run_example):
        assert layers == 4
        assert mean(before[-5:]) < mean(before[:5])
        assert mean(after[:5]) < mean(before[-5:]) and mean(after[-5:]) < mean(after[:5])
