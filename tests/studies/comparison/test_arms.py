"""Arms: what each trains, what it is compared with, that costs match, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.studies.comparison.arms import NAMES, check_budgets, resolve_arms
from ds_stacking.studies.comparison.plan import ArmRun, Cost, pilot_stages, plan_runs, steps_at, unit_of

COSTS = {2: Cost(flops=1.0, seconds=2.0), 4: Cost(flops=2.0, seconds=3.0), 8: Cost(flops=4.0, seconds=5.0)}
CONFIG = RunConfig(stages="2:1000,4:2000,8:5000")
FLOPS = 1000 * 1 + 2000 * 2 + 5000 * 4
BUDGETS = (0.5, 0.7, 1.0, 1.4)
A_STAGE = StageConfig(layers=2, steps=5)


def spent(run: ArmRun, kind: str) -> float:
    return sum(stage.steps * getattr(COSTS[stage.layers], kind) for stage in run.stages(CONFIG, CONFIG.lr))


def runs(names: Sequence[str] = NAMES, own: Sequence[str] = (), seeds: Sequence[int] = (1, 2)) -> dict[str, ArmRun]:
    arms = resolve_arms(CONFIG, names, own)
    return {run.path: run for run in plan_runs(CONFIG, arms, BUDGETS, seeds, COSTS)}


def test_every_arm_is_matched_in_flops_and_in_time() -> None:
    planned = runs()
    seconds = FLOPS / 4.0 * 5.0
    for path, run in planned.items():
        if run.arm.kind == "scratch":
            assert spent(run, "flops") == pytest.approx(FLOPS * float(run.label[1:]), rel=1e-3)
            assert run.arm.depths == [8]
        else:
            kind, target = {"flops": ("flops", FLOPS), "time": ("seconds", seconds)}[run.label]
            assert spent(run, kind) == pytest.approx(target, rel=1e-3), path
    assert {run.arm.name for run in planned.values()} == {
        *NAMES, "shallow_2", "shallow_4", "scratch_gong2019",
    }  # fmt: skip


@pytest.mark.parametrize("names", [["scratch"], ["stack"], ["scratch", "stack"]])
def test_no_comparison_is_without_every_depth_throughout(names: list[str]) -> None:
    planned = runs(names)
    for layers, cost in ((2, 1.0), (4, 2.0)):
        run = planned[f"shallow_{layers}/flops/seed-1"]
        assert [(s.layers, s.steps) for s in run.stages(CONFIG, CONFIG.lr)] == [(layers, round(FLOPS / cost))]
    assert ("scratch/x1/seed-1" in planned) == ("scratch" in names)


def test_depths_that_only_an_own_arm_passes_are_arms_too() -> None:
    planned = runs(["scratch"], ["slow=1:1,8:1,operator=last"], seeds=()) or resolve_arms(
        CONFIG, ["scratch"], ["slow=1:1,8:1,operator=last"]
    )
    assert [name for name in planned if name.startswith("shallow")] == ["shallow_1", "shallow_2", "shallow_4"]


def test_where_both_mean_the_same_steps_one_run_serves() -> None:
    costs = {depth: Cost(flops=cost.flops, seconds=3 * cost.flops) for depth, cost in COSTS.items()}
    arms = resolve_arms(CONFIG, ["scratch", "stack"])
    labels = [run.label for run in plan_runs(CONFIG, arms, BUDGETS, [1], costs)]
    assert labels == ["x0.5", "x0.7", "x1", "x1.4", "flops", "flops", "flops"]


def test_an_arm_with_another_schedule_has_a_scratch_of_its_own() -> None:
    arms = resolve_arms(CONFIG, ["scratch", "stack", "late", "gong2019"], ["mine=2:1,8:1,schedule=linear"])
    baselines = {name: arm.baseline for name, arm in arms.items()}
    assert baselines == {
        "scratch": None, "scratch_gong2019": None, "scratch_linear": None,
        "shallow_2": "scratch", "shallow_4": "scratch",
        "stack": "scratch", "late": "scratch", "gong2019": "scratch_gong2019", "mine": "scratch_linear",
    }  # fmt: skip
    linear = RunConfig(stages="2:1,4:1", schedule="linear")
    arms = resolve_arms(linear, ["scratch", "stack", "late"])
    assert (arms["late"].baseline, arms["stack"].baseline) == ("scratch_wsd", "scratch")
    assert arms["scratch_wsd"].settings == {"schedule": "wsd"}
    assert all(arm.baseline is None for arm in resolve_arms(CONFIG, ["stack", "late"]).values()), "scratch left out"


def test_the_late_arm_jumps_before_the_decay_and_the_random_one_by_its_seed() -> None:
    planned = runs()
    late = planned["late/flops/seed-1"].stages(CONFIG, 1e-3)
    assert [stage.layers for stage in late] == [2, 8]
    assert late[0].steps / (late[0].steps + late[1].steps) == pytest.approx(0.6, abs=1e-3), "decay takes 30 %"
    times = [
        tuple(stage.steps for stage in planned[f"random/flops/seed-{seed}"].stages(CONFIG, 1e-3)) for seed in (1, 2)
    ]
    assert times[0] != times[1] and all(min(steps) > 0 for steps in times)


def test_the_published_staircase_falls_to_69_and_38_percent_of_the_peak() -> None:
    stages = runs(["gong2019"])["gong2019/flops/seed-1"].stages(CONFIG, 8e-4)
    assert [(stage.lr, stage.lr_end) for stage in stages] == [
        (pytest.approx(8e-4), pytest.approx(5.5e-4)),
        (pytest.approx(5.5e-4), pytest.approx(3e-4)),
        (pytest.approx(3e-4), 0.0),
    ]
    assert [stage.warmup_steps for stage in stages] == [CONFIG.warmup_steps, 0, 0]
    (whole,) = runs(["scratch", "gong2019"])["scratch_gong2019/x1/seed-1"].stages(CONFIG, 8e-4)
    assert (whole.lr, whole.lr_end) == (8e-4, 0.0)


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "scratch"), "scratch", "shallow_4", "mine"])
def test_the_options_of_a_run_make_it(name: str) -> None:
    own = ["mine=2:10,4:10,8:20,operator=middle,lr=0.0123"]
    run = next(run for run in runs(NAMES, own).values() if run.arm.name == name)
    lr = float(run.arm.settings.get("lr", 4e-3))
    options = ["--recipe=quickstart", "--stages=1:5", "--operator=middle", *run.options(CONFIG, lr)]
    config = parse_run(options)
    assert config.stages == run.stages(CONFIG, lr) and config.seed == run.seed
    for field, value in run.arm.settings.items():
        found: Any = config
        for part in field.split("."):
            found = getattr(found, part)
        assert str(found).lower() == value.lower()
    assert config.lr == lr


def test_an_own_arm_is_what_is_written() -> None:
    own = ["slow=2:10,8:30,operator=0,1,0,1,0,1,0,1,optimizer_state=reset,lr=1e-3"]
    run = runs(["scratch", "stack"], own)["slow/flops/seed-1"]
    assert run.arm.settings == {"operator": "0,1,0,1,0,1,0,1", "optimizer_state": "reset", "lr": "1e-3"}
    stages = run.stages(CONFIG, 1e-3)
    assert [stage.layers for stage in stages] == [2, 8]
    assert stages[0].steps * 3 == pytest.approx(stages[1].steps, abs=3)
    assert spent(run, "flops") == pytest.approx(FLOPS, rel=1e-3)
    plain = resolve_arms(CONFIG, [], ["slow=2:10,8:30"])["slow"]
    assert plain.settings == {"operator": CONFIG.operator, "optimizer_state": CONFIG.optimizer_state}


def test_stages_keep_what_the_recipe_says_of_a_depth() -> None:
    stages = [StageConfig(layers=2, steps=10), StageConfig(layers=4, steps=10, rewarm_steps=3, micro_batch_size=8)]
    config = RunConfig(stages=stages)
    arms = resolve_arms(config, ["scratch", "stack"])
    by_arm = {run.arm.name: run.stages(config, 1e-3) for run in plan_runs(config, arms, BUDGETS, [1], COSTS)}
    (deep,), (shallow,) = by_arm["scratch"], by_arm["shallow_2"]
    assert (deep.micro_batch_size, deep.rewarm_steps, shallow.micro_batch_size) == (8, 0, None)
    assert (by_arm["stack"][1].micro_batch_size, by_arm["stack"][1].rewarm_steps) == (8, 3)
    assert [(stage.layers, stage.steps) for stage in pilot_stages(config, arms, 7)] == [(2, 7), (4, 7)]


def test_minutes_scale_all_runs_alike() -> None:
    arms = resolve_arms(CONFIG, ["scratch", "stack"])
    planned = plan_runs(CONFIG, arms, BUDGETS, [1, 2], COSTS)
    unit = unit_of(CONFIG, 6000.0, planned, COSTS, overhead=20.0, at_once=2)
    scaled = plan_runs(CONFIG, arms, BUDGETS, [1, 2], COSTS, unit)
    assert sum(run.seconds(COSTS) + 20 for run in scaled) == pytest.approx(2 * 360_000)
    assert [run.steps / unit for run in scaled] == pytest.approx([run.steps for run in planned])
    assert steps_at(CONFIG, arms["stack"], 1, COSTS, unit)[0] == pytest.approx(8000 * unit)
    with pytest.raises(UserError, match="minutes leave scratch/x0.5/seed-1 .* steps, and it needs more than 150"):
        unit_of(CONFIG, 6.0, planned, COSTS, overhead=20.0, at_once=1)


@pytest.mark.parametrize(
    ("fields", "arms", "own", "part"),
    [
        ({}, ["scratch", "gong"], (), "arm 'gong' is unknown; did you mean gong2019"),
        ({}, ["scratch", "stack", "stack"], (), "stack is named twice"),
        ({}, ["scratch", "scratch"], (), "scratch is named twice"),
        ({}, ["scratch", "stak"], (), "arm 'stak' is unknown; did you mean stack"),
        ({"operator": "stak"}, ["scratch", "stack"], (), "operator 'stak' is unknown"),
        ({"schedule": "constant"}, ["scratch", "stack"], (), "must fall to 0"),
        ({"decay_percent": 0.0}, ["scratch", "stack"], (), "must fall to 0"),
        ({"stages": [StageConfig(layers=2, steps=5, lr=0.1)]}, ["scratch"], (), "must fall to 0"),
        ({"stages": [A_STAGE, replace(A_STAGE, sequence_length=32)]}, ["scratch"], (), "differ in sequence_length"),
        ({"stages": [A_STAGE, replace(A_STAGE, tokens_per_step=64)]}, ["scratch"], (), "in tokens_per_step at one"),
        ({"stages": "2:10"}, ["scratch", "stack"], (), "nothing grows"),
        ({"stages": "2:10"}, ["scratch"], (), "Nothing is left to compare"),
        ({"stages": "2:10,3:10"}, ["scratch", "stack"], (), "not a multiple"),
        ({"stages": "2:10,3:10"}, ["scratch", "interleave"], (), "not a multiple"),
        ({"schedule": "linear", "decay_percent": 0.0}, ["scratch", "late"], (), "needs a decay_percent above 0"),
        ({}, ["scratch"], ["mine"], "is no NAME=LAYERS:STEPS"),
        ({}, ["scratch"], ["my arm=2:1,8:1"], "is no NAME=LAYERS:STEPS"),
        ({}, ["scratch"], ["stack=2:1,8:1"], "a name that the comparison needs"),
        ({}, ["scratch"], ["shallow_9=2:1,8:1"], "a name that the comparison needs"),
        ({}, ["scratch"], ["mine=2:1,8"], "is not LAYERS:STEPS"),
        ({}, ["scratch"], ["mine=2:1,4:1"], "arm mine ends with 4 layers, the recipe with 8"),
        ({}, ["scratch"], ["mine=4:1,2:1,8:1"], "goes from 4 layers to 2"),
        ({}, ["scratch"], ["mine=2:1,8:1,seed=3"], "arm mine sets 'seed'; an arm may set operator"),
        ({}, ["scratch"], ["mine=2:1,8:1,lr=1,lr=2"], "sets something twice"),
        ({}, ["scratch"], ["mine=2:1,8:1,lr=fast"], "lr is 'fast'"),
        ({}, ["scratch"], ["mine=2:1,8:1,lr=-1"], "lr is '-1'"),
        ({}, ["scratch"], ["mine=2:1,8:1,schedule=constant"], "schedule is 'constant'; it must be linear or wsd"),
        ({}, ["scratch"], ["mine=2:1,8:1,optimizer_state=keep"], "optimizer_state 'keep' is unknown"),
        ({}, ["scratch"], ["mine=2:1,8:1,operator=stak"], "operator 'stak' is unknown"),
        ({}, ["scratch"], ["mine=3:1,8:1,operator=stack"], "not a multiple"),
        ({}, ["scratch"], ["mine=2:1,8:1", "mine=2:2,8:1"], "mine is named twice"),
    ],
)
def test_unfair_or_impossible_comparisons_are_refused(
    fields: dict[str, Any], arms: list[str], own: Sequence[str], part: str
) -> None:
    with pytest.raises(UserError, match=part):
        resolve_arms(RunConfig(**fields), arms, own)


@pytest.mark.parametrize(
    ("budgets", "part"),
    [
        ((0.5, 1.0, 1.5), "four or more"),
        ((1.0, 1.2, 1.4, 2.0), "both sides of it"),
        ((0.5, 0.8, 1.2, 1.4), "1 among them"),
        ((0.5, float("nan"), 1.0, 2.0), "budgets holds nan"),
        ((0.5, float("inf"), 1.0, 2.0), "budgets holds inf"),
        ((0.5, 1e-300, 1.0, 2.0), "budgets holds 1e-300"),
        ((0.5, 1.0, 1.0, 2.0), "different positive numbers"),
        ((0.7000001, 0.7000002, 2.0, 1.0), "different positive numbers"),
        ((1.0, *(1.5 + i / 100 for i in range(40)), 0.5), "give at most 20"),
    ],
)
def test_budgets_that_tell_nothing_are_refused(budgets: tuple[float, ...], part: str) -> None:
    check_budgets(BUDGETS)
    with pytest.raises(UserError, match=part):
        check_budgets(budgets)
