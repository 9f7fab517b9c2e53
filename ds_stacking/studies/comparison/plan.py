"""The plan of a comparison: its runs at equal FLOPs and equal time, and comparison.json, where it stands.

The unit of all budgets is what the recipe itself spends in FLOPs; an equal time is the time in which a model of the
final depth spends them. What a step costs at each depth was measured by a pilot on the machine that trains.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import plain
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.studies.comparison.arms import Arm, budget_label, recipe_stages, stage_of
from ds_stacking.studies.comparison.shapes import ArmPlan, Plan
from ds_stacking.training.changes import WITHOUT_EFFECT, Settings, by_name, describe, find_changes

SAME_PLAN = 0.02
"""Where equal time means so nearly the steps of equal FLOPs, relatively, one run serves for both."""
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy")
SHORTEST = 10
"""Steps of a run, as a multiple of its stages, that --minutes leaves at the least."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one optimizer step costs at a depth."""

    flops: float
    """Model FLOPs."""
    seconds: float
    """Seconds of training, by the comparison's clock."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One run of a comparison."""

    arm: Arm
    """What it is a run of."""
    label: str
    """`flops` or `time`, which of the two it matches; for scratch its budget, such as x0.7; lr0.003 in the tuning."""
    seed: int
    """Seed of everything random."""
    steps: float
    """Optimizer steps of all stages."""

    @property
    def path(self) -> str:
        """Its run directory inside that of the comparison."""
        return f"{self.arm.name}/{self.label}/seed-{self.seed}"

    def stages(self, config: RunConfig, lr: float) -> list[StageConfig]:
        """Its stages at the peak learning rate `lr`."""
        return self.arm.stages(config, self.seed, self.steps, lr)

    def options(self, config: RunConfig, lr: float) -> list[str]:
        """Options of pretrain.py that make the recipe this run at the peak `lr`; they come last, so they win."""
        stages = json.dumps([asdict(stage) for stage in self.stages(config, lr)])
        settings = {"name": f"{self.arm.name}-{self.label}", "seed": str(self.seed), **self.arm.settings}
        return [f"--stages={stages}", *(f"--{name}={value}" for name, value in settings.items()), f"--lr={lr!r}"]

    def seconds(self, costs: Mapping[int, Cost]) -> float:
        """Seconds of its steps, by the pilot."""
        return sum(share * self.steps * costs[layers].seconds for layers, share in self.arm.shares(self.seed))


def check_same_recipe(folder: Path, plan: Plan, recipe: Mapping[str, Any], clock: str) -> None:
    """Raise UserError where what was planned is another comparison than one of this recipe by this clock."""
    found = find_changes(_settings(plan["recipe"], plan["clock"]), _settings(recipe, clock))
    if other := {name: pair for name, pair in found.items() if name not in WITHOUT_EFFECT}:
        raise UserError(
            f"{folder} holds a comparison of another recipe ({describe(other)}); choose another --output_dir."
        )


def _settings(recipe: Mapping[str, Any], clock: str) -> Settings:
    """What makes a comparison; its runs take the data of the plan's fingerprint without a look at `data`."""
    also = {name: recipe.get(name) for name in ("data", "deepspeed_config", "branch_from")}
    return {**by_name(recipe), **also, "clock": clock}


def plan_runs(
    config: RunConfig,
    arms: Mapping[str, Arm],
    budgets: Sequence[float],
    seeds: Sequence[int],
    costs: Mapping[int, Cost],
    unit: float = 1.0,
) -> list[ArmRun]:
    """All runs that count, seed by seed, so that a part of them compares already.

    Args:
        config: The recipe.
        arms: From resolve_arms.
        budgets: Of every arm from scratch, in units.
        seeds: One run of each for every seed.
        costs: Of a step, by depth.
        unit: What the recipe's own FLOPs are multiplied with.
    """
    return [run for seed in seeds for arm in arms.values() for run in _runs(config, arm, budgets, seed, costs, unit)]


def _runs(
    config: RunConfig, arm: Arm, budgets: Sequence[float], seed: int, costs: Mapping[int, Cost], unit: float
) -> list[ArmRun]:
    flops, seconds = steps_at(config, arm, seed, costs, unit)
    if arm.kind == "scratch":
        steps = {budget_label(budget): budget * flops for budget in sorted(set(budgets))}
    elif arm.kind == "shallow" or abs(seconds / flops - 1) < SAME_PLAN:
        steps = {"flops": flops}
    else:
        steps = {"flops": flops, "time": seconds}
    return [ArmRun(arm=arm, label=label, seed=seed, steps=count) for label, count in steps.items()]


def steps_at(config: RunConfig, arm: Arm, seed: int, costs: Mapping[int, Cost], unit: float) -> tuple[float, float]:
    """Steps of an arm that spend a unit of FLOPs, and those that take scratch's time for it."""
    stages = recipe_stages(config)
    final = costs[stages[-1].layers]
    flops = unit * sum(stage.steps * costs[stage.layers].flops for stage in stages)
    shares = arm.shares(seed)
    return (
        flops / sum(share * costs[layers].flops for layers, share in shares),
        flops / final.flops * final.seconds / sum(share * costs[layers].seconds for layers, share in shares),
    )


def unit_of(
    config: RunConfig, minutes: float, runs: Sequence[ArmRun], costs: Mapping[int, Cost], overhead: float, at_once: int
) -> float:
    """What steps are multiplied with for all `runs` together to take `minutes`.

    `overhead` are seconds of a run without its steps; `at_once` is how many run at a time. Raises UserError where so
    little is left that nothing could be learnt, or that the warm-up takes more than a third of a run.
    """
    left = 60 * minutes * at_once - overhead * len(runs)
    unit = left / sum(run.seconds(costs) for run in runs)
    for run in runs:
        least = max(3 * config.warmup_steps, SHORTEST * len(run.arm.depths))
        if unit * run.steps <= least:
            raise UserError(
                f"{minutes:g} minutes leave {run.path} {max(0, round(unit * run.steps))} steps, and it needs more "
                f"than {least}; give more --minutes, or fewer --seeds, --arms or --warmup_steps."
            )
    return unit


def pilot_stages(config: RunConfig, arms: Mapping[str, Arm], steps: int) -> list[StageConfig]:
    """A few steps at every depth of the arms, shallow to deep."""
    depths = sorted({depth for arm in arms.values() for depth in arm.depths} | {recipe_stages(config)[-1].layers})
    return [stage_of(config, layers, steps, first=True) for layers in depths]


def plan_arm(config: RunConfig, arm: Arm) -> ArmPlan:
    """An arm as comparison.json names it; `lr` is its peak as long as no tuning has chosen one."""
    return {
        "kind": arm.kind,
        "meaning": arm.meaning,
        "depths": arm.depths,
        "baseline": arm.baseline,
        "lr": float(arm.settings.get("lr", config.lr)),
        "settings": dict(arm.settings),
    }


def commit() -> str | None:
    """The git commit of this code, `-dirty` where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, cores and GPUs of this machine, as Linux names them; no device is touched for it."""
    return {
        "processor": (_lines_of(Path("/proc/cpuinfo"), "model name") or [platform.machine()])[0],
        "cores": os.cpu_count() or 1,
        "gpus": [
            name
            for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
            for name in _lines_of(path, "Model")
        ],
    }


def _lines_of(path: Path, name: str) -> list[str]:
    """What stands behind `name` and a colon in the lines of a file; nothing where it cannot be read."""
    try:
        lines = [line.partition(":") for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [plain(value.strip(), 60) for key, _, value in lines if key.strip() == name]


def versions() -> dict[str, str]:
    """Versions of the packages that make the figures."""
    return {name: version(name) for name in PACKAGES}
