"""Arms: what each trains, that costs match, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.studies.comparison.arms import ARMS, ArmRun, Cost, check_arms, pilot_stages, plan_arms

COSTS = {2: Cost(flops=1.0, seconds=2.0), 4: Cost(flops=2.0, seconds=3.0), 8: Cost(flops=4.0, seconds=5.0)}
CONFIG = RunConfig(stages="2:1000,4:2000,8:5000")
FLOPS = 1000 * 1 + 2000 * 2 + 5000 * 4
BUDGETS = (0.7, 1.0, 1.4)


def spent(run: ArmRun, kind: str) -> float:
    return sum(stage.steps * getattr(COSTS[stage.layers], kind) for stage in run.stages)


def runs(arms: Sequence[str] = tuple(ARMS), seeds: int = 2) -> dict[str, ArmRun]:
    return {run.path: run for run in plan_arms(CONFIG, arms, BUDGETS, seeds, COSTS)}


def test_every_arm_is_matched_in_flops_and_in_time() -> None:
    planned = runs()
    seconds = FLOPS / 4.0 * 5.0
    for path, run in planned.items():
        if run.arm == "scratch":
            assert spent(run, "flops") == pytest.approx(FLOPS * float(run.label[1:]), rel=1e-3)
            assert [stage.layers for stage in run.stages] == [8]
        else:
            kind, target = {"flops": ("flops", FLOPS), "time": ("seconds", seconds)}[run.label]
            assert spent(run, kind) == pytest.approx(target, rel=1e-3), path
    assert {run.arm for run in planned.values()} == set(ARMS)


def test_where_both_mean_the_same_steps_one_run_serves() -> None:
    proportional = {depth: Cost(flops=cost.flops, seconds=3 * cost.flops) for depth, cost in COSTS.items()}
    labels = [run.label for run in plan_arms(CONFIG, ["scratch", "stack"], BUDGETS, 1, proportional)]
    assert labels == ["x0.7", "x1", "x1.4", "flops"]


def test_the_late_arm_jumps_before_the_decay_and_the_random_one_by_its_seed() -> None:
    planned = runs()
    late = planned["late/flops/seed-1"].stages
    assert [stage.layers for stage in late] == [2, 8]
    assert late[0].steps / (late[0].steps + late[1].steps) == pytest.approx(0.6, abs=1e-3), "decay takes 30 %"
    times = [tuple(stage.steps for stage in planned[f"random/flops/seed-{seed}"].stages) for seed in (1, 2)]
    assert times[0] != times[1] and all(min(steps) > 0 for steps in times)
    assert runs() == planned


@pytest.mark.parametrize("arm", ARMS)
def test_the_options_of_a_run_make_it(arm: str) -> None:
    run = next(run for run in runs().values() if run.arm == arm)
    config = parse_run(["--recipe=quickstart", "--stages=1:5", "--operator=middle", *run.options()])
    assert config.stages == run.stages and config.seed == run.seed
    for name, value in ARMS[arm].settings.items():
        assert getattr(config, name) == value


def test_stages_keep_what_the_recipe_says_of_a_depth() -> None:
    stages = [StageConfig(layers=2, steps=10), StageConfig(layers=4, steps=10, rewarm_steps=3, micro_batch_size=8)]
    config = RunConfig(stages=stages)
    (scratch, *_, stack) = plan_arms(config, ["scratch", "stack"], BUDGETS, 1, COSTS)
    assert (scratch.stages[0].micro_batch_size, scratch.stages[0].rewarm_steps) == (8, 0)
    assert (stack.stages[1].micro_batch_size, stack.stages[1].rewarm_steps) == (8, 3)
    assert [(stage.layers, stage.steps) for stage in pilot_stages(config, 7)] == [(2, 7), (4, 7)]


@pytest.mark.parametrize(
    ("fields", "arms", "budgets", "part"),
    [
        ({}, ["scratch", "gong"], BUDGETS, "arm 'gong' is unknown"),
        ({}, ["stack"], BUDGETS, "must hold scratch"),
        ({}, ["scratch", "stack", "stack"], BUDGETS, "each arm once"),
        ({}, ["scratch", "stack"], (0.5, 1.5), "three or more"),
        ({}, ["scratch", "stack"], (1.0, 1.2, 1.4), "both sides of 1"),
        ({}, ["scratch", "stak"], BUDGETS, "arm 'stak' is unknown; did you mean stack"),
        ({}, ["scratch", "stack"], (0.5, float("nan"), 2.0), "budgets holds nan"),
        ({}, ["scratch", "stack"], (0.5, float("inf"), 2.0), "budgets holds inf"),
        ({}, ["scratch", "stack"], (0.5, 1e-300, 2.0), "budgets holds 1e-300"),
        ({}, ["scratch", "stack"], (0.5, 1.0, 1.0, 2.0), "different positive numbers"),
        ({}, ["scratch", "stack"], (0.7000001, 0.7000002, 2.0, 1.0), "different positive numbers"),
        ({}, ["scratch", "stack"], tuple(0.5 + i / 100 for i in range(99)), "give at most 20"),
        ({"operator": "stak"}, ["scratch", "stack"], BUDGETS, "operator 'stak' is unknown"),
        ({"schedule": "constant"}, ["scratch", "stack"], BUDGETS, "must fall to 0"),
        ({"decay_percent": 0.0}, ["scratch", "stack"], BUDGETS, "must fall to 0"),
        ({"stages": [StageConfig(layers=2, steps=5, lr=0.1)]}, ["scratch"], BUDGETS, "must fall to 0"),
        ({"stages": "2:10"}, ["scratch", "stack"], BUDGETS, "nothing grows"),
        ({"stages": "2:10,3:10"}, ["scratch", "stack"], BUDGETS, "not a multiple"),
        ({"stages": "2:10,3:10"}, ["scratch", "interleave"], BUDGETS, "not a multiple"),
    ],
)
def test_unfair_or_impossible_comparisons_are_refused(
    fields: dict[str, object], arms: list[str], budgets: tuple[float, ...], part: str
) -> None:
    with pytest.raises(UserError, match=part):
        check_arms(RunConfig(**fields), arms, budgets)  # type: ignore[arg-type]
