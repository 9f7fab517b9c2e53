"""The learning rate at every step against PyTorch's own schedulers and the published staircase."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from ds_stacking.command_line import parse_run
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.training.schedule import Schedule

STAGES = "2:30,4:50,8:120"


def rates(config: RunConfig) -> list[float]:
    """The rate of every step of a run."""
    schedule = Schedule(config)
    places = [(index, step) for index, stage in enumerate(schedule.stages) for step in range(stage.steps)]
    return [schedule(number, *place) for number, place in enumerate(places)]


def pytorch_rates(lr: float, *parts: tuple[int, float, float]) -> list[float]:
    """PyTorch's rates over parts of (steps, factor at the start, factor reached after the last step)."""
    result: list[float] = []
    for steps, start, end in parts:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        # LinearLR refuses a start of 0; a part that starts there is computed backwards.
        if start:
            scheduler = lr_scheduler.LinearLR(optimizer, start_factor=start, end_factor=end, total_iters=steps)
        else:
            scheduler = lr_scheduler.LinearLR(optimizer, start_factor=end, end_factor=start, total_iters=steps)
        part = []
        for _ in range(steps + 1):
            part.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        # A warm-up's first step already has a rate: step n of N has n/N of the peak.
        result += part[:-1] if start else part[::-1][1:]
    return result


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ("constant", [(20, 0.0, 1.0), (180, 1.0, 1.0)]),
        ("linear", [(20, 0.0, 1.0), (180, 1.0, 0.0)]),
        ("wsd", [(20, 0.0, 1.0), (130, 1.0, 1.0), (50, 1.0, 0.0)]),
    ],
)
def test_schedules_of_a_run(schedule: str, parts: list[tuple[int, float, float]]) -> None:
    config = RunConfig(stages=STAGES, schedule=schedule, lr=0.3, warmup_steps=20, decay_percent=25.0)  # type: ignore[arg-type]
    assert rates(config) == pytest.approx(pytorch_rates(0.3, *parts), rel=1e-9)


def test_no_growth_shows_in_the_schedule_of_a_run() -> None:
    assert rates(RunConfig(stages=STAGES)) == rates(RunConfig(stages="2:200"))


def test_a_decay_longer_than_the_run_begins_after_the_warm_up() -> None:
    config = RunConfig(stages="2:10", lr=1.0, warmup_steps=4, decay_percent=100.0)
    assert rates(config) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak() -> None:
    assert rates(RunConfig(stages="2:4", lr=1.0, warmup_steps=8)) == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_the_published_staircase() -> None:
    """Figures of the published code's schedule, by hand: 8e-4 -> 5.5e-4 -> 3e-4 -> 1.95e-4."""
    schedule = Schedule(parse_run(["--recipe", "bert_base_gong2019"]))
    assert schedule(0, 0, 0) == pytest.approx(8e-8)
    assert schedule(9_999, 0, 9_999) == pytest.approx(8e-4)
    assert schedule(30_000, 0, 30_000) == pytest.approx(6.75e-4)
    assert schedule(49_999, 0, 49_999) == pytest.approx(5.5e-4, rel=1e-4)
    assert schedule(50_000, 1, 0) == pytest.approx(5.5e-4)  # no warm-up after a growth
    assert schedule(85_000, 1, 35_000) == pytest.approx(4.25e-4)
    assert schedule(120_000, 2, 0) == pytest.approx(3e-4)
    assert schedule(399_999, 2, 279_999) == pytest.approx(1.95e-4, rel=1e-5)  # 3e-4 * (1 - 280/800)


def test_a_stage_without_lr_follows_the_run() -> None:
    own = StageConfig(layers=4, steps=10, lr=0.5, lr_end=0.1, warmup_steps=2)
    config = RunConfig(stages=[StageConfig(layers=2, steps=10), own], schedule="constant", lr=1.0, warmup_steps=0)
    assert rates(config) == pytest.approx([1.0] * 10 + [0.25, 0.5] + [0.5 - 0.05 * step for step in range(8)])


def test_only_blocks_of_a_growth_warm_up_again() -> None:
    stages = [StageConfig(layers=2, steps=10), StageConfig(layers=4, steps=10, rewarm_steps=4)]
    schedule = Schedule(RunConfig(stages=stages))
    assert [schedule.newest(1, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.newest(0, 0) == 1.0
