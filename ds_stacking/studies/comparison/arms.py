"""Arms of a comparison: the ways to one depth, and how many steps each gets at equal FLOPs or equal time.

Every arm is a pre-training run like any other: the recipe with other stages. The unit of all budgets is what the
recipe itself spends in FLOPs; an equal time is the time in which a model of the final depth spends them. What a step
costs at each depth was measured by a pilot on the machine that trains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import nearest, shown
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.growth.operators import layer_map, parse_operator

SAME_PLAN = 0.02
"""Where equal time means so nearly the steps of equal FLOPs, relatively, one run serves for both."""
LEAST, MOST_BUDGETS = 1e-3, 20
"""The smallest budget of scratch, whose inverse is the largest, and how many there may be."""
Shares = list[tuple[int, float]]
"""Depth and share of the optimizer steps, by stage."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one optimizer step costs at a depth."""

    flops: float
    """Model FLOPs."""
    seconds: float
    """Seconds of training, by the comparison's clock."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to the final depth."""

    meaning: str
    """What it is, in a few words."""
    shares: Callable[[RunConfig, int], Shares]
    """Its stages, from the recipe and the seed."""
    settings: Mapping[str, str]
    """Fields of the recipe that it sets."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One run of a comparison."""

    arm: str
    """Name of the arm."""
    label: str
    """`flops` or `time`, which of the two it matches; for scratch its budget, such as x0.7."""
    seed: int
    """Seed of everything random."""
    stages: list[StageConfig]
    """Its stages."""
    settings: Mapping[str, str]
    """Fields of the recipe that it sets."""

    @property
    def path(self) -> str:
        """Its run directory inside that of the comparison."""
        return f"{self.arm}/{self.label}/seed-{self.seed}"

    def options(self) -> list[str]:
        """Options of pretrain.py that make the recipe this run; they come last, so they win."""
        stages = json.dumps([asdict(stage) for stage in self.stages])
        settings = {"name": f"{self.arm}-{self.label}", "seed": str(self.seed), **self.settings}
        return [f"--stages={stages}", *(f"--{name}={value}" for name, value in settings.items())]


def recipe_stages(config: RunConfig) -> list[StageConfig]:
    """The recipe's stages."""
    assert isinstance(config.stages, list)
    return config.stages


def _recipe_shares(config: RunConfig, seed: int) -> Shares:
    stages = recipe_stages(config)
    total = sum(stage.steps for stage in stages)
    return [(stage.layers, stage.steps / total) for stage in stages]


def _scratch(config: RunConfig, seed: int) -> Shares:
    return [(recipe_stages(config)[-1].layers, 1.0)]


def _late(config: RunConfig, seed: int) -> Shares:
    """One jump a tenth of the steps before the learning rate decays: time to mix, then decay (Bu 2025, 2511.04981)."""
    stages = recipe_stages(config)
    before = max(0.1, 0.9 - config.decay_percent / 100)
    return [(stages[0].layers, before), (stages[-1].layers, 1 - before)]


def _random(config: RunConfig, seed: int) -> Shares:
    """The recipe's depths with growths at times drawn from the seed."""
    stages = recipe_stages(config)
    times = np.sort(np.random.default_rng([seed, 2019]).uniform(0.05, 0.95, len(stages) - 1))
    shares = np.diff([0.0, *times, 1.0])
    return [(stage.layers, float(share)) for stage, share in zip(stages, shares, strict=True)]


def _growth(operator: str, optimizer_state: str, **settings: str) -> dict[str, str]:
    return {"operator": operator, "optimizer_state": optimizer_state, **settings}


ARMS: dict[str, Arm] = {
    "scratch": Arm(meaning="the final depth from the first step", shares=_scratch, settings={}),
    "reset": Arm(
        meaning="stacking as published: moments reset at every growth",
        shares=_recipe_shares,
        settings=_growth("stack", "reset"),
    ),
    "stack": Arm(
        meaning="stacking, moments and step counts kept and copied",
        shares=_recipe_shares,
        settings=_growth("stack", "stack"),
    ),
    "interleave": Arm(
        meaning="every block beside its copy, moments kept and copied",
        shares=_recipe_shares,
        settings=_growth("interleave", "stack"),
    ),
    "late": Arm(
        meaning="one jump from the first depth to the last, shortly before the learning rate decays",
        shares=_late,
        settings=_growth("stack", "stack", schedule="wsd"),
    ),
    "random": Arm(
        meaning="stacking at random times, the control",
        shares=_random,
        settings=_growth("stack", "stack"),
    ),
}
"""Arms by name."""


def check_arms(config: RunConfig, arms: Sequence[str], budgets: Sequence[float]) -> None:
    """Raise UserError where the comparison would not be a fair one, or an arm cannot be run."""
    stages = recipe_stages(config)
    unknown = [name for name in arms if name not in ARMS]
    if unknown:
        raise UserError(f"arm {shown(unknown[0])} is unknown; {nearest(unknown[0], ARMS)}")
    if "scratch" not in arms or len(set(arms)) != len(arms):
        raise UserError("arms must hold scratch, with which the others are compared, and each arm once.")
    check_budgets(budgets)
    never = config.schedule == "constant" or (config.schedule == "wsd" and not config.decay_percent)
    if never or any(stage.lr is not None for stage in stages):
        raise UserError(
            "The learning rate must fall to 0 at the end of every arm; give --schedule linear, or wsd with a "
            "decay_percent, and stages without lr."
        )
    if config.trigger != "steps":
        raise UserError(f"trigger {config.trigger} is set; the arms have their own times of growth, so leave it out.")
    if len(stages) < 2 and len(arms) > 1:
        raise UserError("The recipe has one stage, so nothing grows; give --stages with two depths or more.")
    parse_operator(config.operator)  # every run has it, whatever its arm grows by
    for name in arms:
        depths = [layers for layers, _ in ARMS[name].shares(config, 0)]
        for source, target in pairwise(depths):
            layer_map(ARMS[name].settings["operator"], source, target)


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise UserError where scratch's budgets cannot tell what an arm saves."""
    wrong = [budget for budget in budgets if not (math.isfinite(budget) and LEAST <= budget <= 1 / LEAST)]
    if wrong:
        raise UserError(
            f"budgets holds {wrong[0]:g}; give numbers from {LEAST:g} to {1 / LEAST:g}, such as 0.7,1,1.4."
        )
    if len(set(map(budget_label, budgets))) < max(3, len(budgets)) or not min(budgets) < 1 < max(budgets):
        raise UserError(
            "budgets must be three or more different positive numbers, on both sides of 1, such as 0.7,1,1.4."
        )
    if len(budgets) > MOST_BUDGETS:
        raise UserError(f"budgets holds {len(budgets):,} numbers; give at most {MOST_BUDGETS}.")


def budget_label(budget: float) -> str:
    """What a run of scratch with this budget is called."""
    return f"x{budget:g}"


def pilot_stages(config: RunConfig, steps: int) -> list[StageConfig]:
    """A few steps at every depth of the recipe, shallow to deep."""
    depths = sorted({stage.layers for stage in recipe_stages(config)})
    return [_stage(config, layers, steps, first=True) for layers in depths]


def plan_arms(
    config: RunConfig, arms: Sequence[str], budgets: Sequence[float], seeds: int, costs: Mapping[int, Cost]
) -> list[ArmRun]:
    """All runs of a comparison, seed by seed, so that a part of it compares already. `costs` are by depth."""
    stages = recipe_stages(config)
    flops = sum(stage.steps * costs[stage.layers].flops for stage in stages)
    final = costs[stages[-1].layers]
    seconds = flops / final.flops * final.seconds
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        for name in arms:
            shares = ARMS[name].shares(config, seed)
            per_step = {
                kind: sum(share * getattr(costs[d], kind) for d, share in shares) for kind in Cost.__annotations__
            }
            steps = {"flops": flops / per_step["flops"], "time": seconds / per_step["seconds"]}
            if name == "scratch":
                steps = {budget_label(budget): budget * steps["flops"] for budget in sorted(set(budgets))}
            elif abs(steps["time"] / steps["flops"] - 1) < SAME_PLAN:
                del steps["time"]
            runs += [
                ArmRun(
                    arm=name,
                    label=label,
                    seed=seed,
                    stages=_stages(config, shares, count),
                    settings=ARMS[name].settings,
                )
                for label, count in steps.items()
            ]
    return runs


def _stages(config: RunConfig, shares: Shares, steps: float) -> list[StageConfig]:
    """Stages with `steps` in all, as the shares divide them."""
    ends = [round(steps * float(end)) for end in np.cumsum([share for _, share in shares])]
    counts = [max(1, end - start) for start, end in pairwise([0, *ends])]
    depths = [layers for layers, _ in shares]
    return [
        _stage(config, layers, count, first=i == 0)
        for i, (layers, count) in enumerate(zip(depths, counts, strict=True))
    ]


def _stage(config: RunConfig, layers: int, steps: int, *, first: bool) -> StageConfig:
    """The recipe's stage of a depth with other steps; how it is grown into is the arm's."""
    (*_, own) = (stage for stage in recipe_stages(config) if stage.layers == layers)
    rewarm = 0 if first else own.rewarm_steps
    return replace(own, steps=steps, operator=None, optimizer_state=None, rewarm_steps=rewarm)
