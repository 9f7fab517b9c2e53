"""Arms of a comparison: the ways to one depth, and what each must be compared with.

Every arm is a pre-training run like any other: the recipe with other stages. Every depth that an arm passes through is
an arm by itself, `shallow_<layers>`, which is never left out: where a shallower model ends lower at the same FLOPs,
depth does not pay, and coming to it late saves nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import nearest, shown
from ds_stacking.config import RunConfig, StageConfig, check_optimizer_state, parse_stages
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.studies.comparison.shapes import NAME

LEAST, MOST_BUDGETS = 1e-3, 20
"""The smallest budget of scratch, whose inverse is the largest, and how many there may be."""
SETTINGS = ("operator", "optimizer_state", "lr", "schedule")
"""Fields of the recipe that an arm of one's own may set."""
GONG_LAST = 0.375
"""Learning rate at the last growth over the peak: 8e-4 falls through 5.5e-4 to 3e-4 (reproduce_bert.sh)."""
Shares = list[tuple[int, float]]
"""Depth and share of the optimizer steps, by stage."""
Kind = Literal["scratch", "shallow", "grown", "own"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to the final depth, or one of the shallow arms, which stay where they begin."""

    name: str
    """What its folder is called."""
    kind: Kind
    """scratch (several budgets), shallow (equal FLOPs only), grown, or own: the user's."""
    meaning: str
    """What it is, in a few words."""
    shares: Callable[[int], Shares]
    """Its stages by the seed."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Fields of the recipe that it sets."""
    staircase: bool = False
    """Its learning rate is a staircase that falls at every growth, as published, and not the recipe's schedule."""
    baseline: str | None = None
    """The arm of kind scratch that it is compared with; it has the same schedule."""

    @property
    def depths(self) -> list[int]:
        """Its depths, first to last."""
        return [layers for layers, _ in self.shares(0)]

    def stages(self, config: RunConfig, seed: int, steps: float, lr: float) -> list[StageConfig]:
        """Its stages with `steps` optimizer steps in all, at the peak learning rate `lr`."""
        shares = self.shares(seed)
        ends = [round(steps * float(end)) for end in np.cumsum([share for _, share in shares])]
        counts = [max(1, end - start) for start, end in pairwise([0, *ends])]
        stages = [
            stage_of(config, layers, count, first=i == 0)
            for i, ((layers, _), count) in enumerate(zip(shares, counts, strict=True))
        ]
        return _staircase(stages, config, lr) if self.staircase else stages


def recipe_stages(config: RunConfig) -> list[StageConfig]:
    """The recipe's stages."""
    return config.stages


def stage_of(config: RunConfig, layers: int, steps: int, *, first: bool) -> StageConfig:
    """The recipe's stage of a depth, or else its last, with other steps; how it is grown into is the arm's."""
    stages = recipe_stages(config)
    (*_, own) = [stages[-1], *(stage for stage in stages if stage.layers == layers)]
    rewarm = 0 if first else own.rewarm_steps
    return replace(own, layers=layers, steps=steps, operator=None, optimizer_state=None, rewarm_steps=rewarm)


def _staircase(stages: list[StageConfig], config: RunConfig, lr: float) -> list[StageConfig]:
    """A warm-up to the peak, then a fall on lines: to 38 % of it at the last growth, and to 0 at the end.

    The published third stage ends at 65 % of its line; here it falls to 0, as that of every arm does.
    """
    growths = max(1, len(stages) - 1)
    rates = [*(lr * (1 - (1 - GONG_LAST) * i / growths) for i in range(len(stages))), 0.0]
    warmup = min(config.warmup_steps, stages[0].steps)
    return [
        replace(stage, lr=rates[i], lr_end=rates[i + 1], warmup_steps=warmup if i == 0 else 0)
        for i, stage in enumerate(stages)
    ]


def _growth(operator: str, optimizer_state: str, **settings: str) -> dict[str, str]:
    return {"operator": operator, "optimizer_state": optimizer_state, **settings}


UNCORRECTED = {"optimizer.eps_correction": "false"}
GROWN: dict[str, tuple[str, dict[str, str]]] = {
    "gong2019": (
        "stacking as published: the rate falls to 69 and 38 % of its peak, moments reset, epsilon not bias-corrected",
        _growth("stack", "reset", **UNCORRECTED),
    ),
    "reset": ("stacking at the recipe's rate, moments reset at every growth", _growth("stack", "reset")),
    "stack": ("stacking, moments and step counts kept and copied", _growth("stack", "stack")),
    "interleave": ("every block beside its copy, moments kept and copied", _growth("interleave", "stack")),
    "late": (
        "one jump from the first depth to the last, shortly before the learning rate decays",
        _growth("stack", "stack", schedule="wsd"),
    ),
    "random": ("stacking at random times, the control", _growth("stack", "stack")),
}
"""What the arms that grow are, and the fields that they set."""
NAMES = ("scratch", *GROWN)
"""Arms that can be named."""


def resolve_arms(config: RunConfig, names: Sequence[str], own: Sequence[str] = ()) -> dict[str, Arm]:
    """Arms by name, with the shallow ones and the scratches of their own that arms with another schedule need.

    `own` are arms as the user writes them, NAME=LAYERS:STEPS,...[,operator=...]. Raises UserError where the comparison
    would not be a fair one, or an arm cannot be run.
    """
    _check_recipe(config)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"arm {shown(unknown[0])} is unknown; {nearest(unknown[0], NAMES)}")
    arms = [_named(config, name) for name in names if name != "scratch"] + [_own(config, text) for text in own]
    stages = recipe_stages(config)
    final = stages[-1].layers
    if len(stages) < 2 and any(name != "scratch" for name in names):
        raise UserError("The recipe has one stage, so nothing grows; give --stages with two depths or more.")
    listed = ["scratch"] * names.count("scratch") + [arm.name for arm in arms]
    twice = next((name for name in listed if listed.count(name) > 1), None)
    if twice:
        raise UserError(f"arm {twice} is named twice; give each arm once, and an arm of your own a name of its own.")
    passed = sorted({stage.layers for stage in stages} | {depth for arm in arms for depth in arm.depths})
    shallow = [_throughout(f"shallow_{layers}", "shallow", layers) for layers in passed if layers < final]
    if len(arms) + len(shallow) == 0:
        raise UserError("Nothing is left to compare; give --arms with more than scratch, or --arm.")
    scratches = {}
    if "scratch" in names:
        needed = {arm.name: _scratch_of(config, arm, final) for arm in arms}
        scratches = {"scratch": _throughout("scratch", "scratch", final)} | {s.name: s for s in needed.values()}
        arms = [replace(arm, baseline=needed[arm.name].name) for arm in arms]
        shallow = [replace(arm, baseline="scratch") for arm in shallow]
    for arm in arms:
        _check_growths(config, arm)
    return {arm.name: arm for arm in (*scratches.values(), *shallow, *arms)}


def _throughout(name: str, kind: Kind, layers: int, **fields: Any) -> Arm:
    """An arm that has one depth from its first step to its last."""
    words = f"{layers} layer{'s' * (layers != 1)} throughout"
    if kind == "scratch":
        words = "the final depth from the first step"
    return Arm(**{"name": name, "kind": kind, "meaning": words, "shares": lambda seed: [(layers, 1.0)], **fields})


def _scratch_of(config: RunConfig, arm: Arm, final: int) -> Arm:
    """The arm from scratch with the schedule of `arm`, and with its epsilon."""
    if arm.staircase:
        return _throughout(
            "scratch_gong2019",
            "scratch",
            final,
            meaning="the final depth from the first step, its rate on one line to 0, epsilon as in gong2019",
            settings=UNCORRECTED,
            staircase=True,
        )
    schedule = arm.settings.get("schedule", config.schedule)
    if schedule == config.schedule:
        return _throughout("scratch", "scratch", final)
    words = f"the final depth from the first step, schedule {schedule}"
    return _throughout(f"scratch_{schedule}", "scratch", final, meaning=words, settings={"schedule": schedule})


def _named(config: RunConfig, name: str) -> Arm:
    meaning, settings = GROWN[name]
    return Arm(
        name=name,
        kind="grown",
        meaning=meaning,
        shares=partial({"late": _late, "random": _random}.get(name, _recipe), config),
        settings=settings,
        staircase=name == "gong2019",
    )


def _recipe(config: RunConfig, seed: int) -> Shares:
    """The recipe's own stages."""
    return _shares(recipe_stages(config))


def _shares(stages: Sequence[StageConfig]) -> Shares:
    total = sum(stage.steps for stage in stages)
    return [(stage.layers, stage.steps / total) for stage in stages]


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


def _own(config: RunConfig, text: str) -> Arm:
    """An arm of the user's: NAME=LAYERS:STEPS,...[,operator=...][,optimizer_state=...][,lr=...][,schedule=...]."""
    name, _, rest = text.partition("=")
    if not re.fullmatch(NAME, name) or not rest:
        raise UserError(f"arm {shown(text)} is no NAME=LAYERS:STEPS,...; write for example slow=1:80,4:560,lr=1e-3.")
    if name in NAMES or re.fullmatch("(scratch|shallow|pilot|report).*", name):
        raise UserError(f"arm {shown(name)} is a name that the comparison needs itself; choose another.")
    depths, *settings = re.split(r",(?=[^,=]*=)", rest)
    given = dict(part.split("=", 1) for part in settings)
    unknown = next((key for key in given if key not in SETTINGS), None)
    if unknown is not None:
        raise UserError(f"arm {name} sets {shown(unknown)}; an arm may set {', '.join(SETTINGS)}.")
    if len(settings) > len(given):
        raise UserError(f"arm {name} sets something twice; give each setting once.")
    _check_own(name, given)
    stages = parse_stages(depths)
    final = recipe_stages(config)[-1].layers
    if stages[-1].layers != final:
        raise UserError(
            f"arm {name} ends with {stages[-1].layers} layers, the recipe with {final}; all arms end at one depth."
        )
    return Arm(
        name=name,
        kind="own",
        meaning=f"as given: {rest}",
        shares=lambda seed: _shares(stages),
        settings={"operator": config.operator, "optimizer_state": config.optimizer_state, **given},
    )


def _check_own(name: str, given: Mapping[str, str]) -> None:
    if "optimizer_state" in given:
        check_optimizer_state(given["optimizer_state"])
    if given.get("schedule", "linear") not in ("linear", "wsd"):
        raise UserError(f"arm {name}: schedule is {shown(given['schedule'])}; it must be linear or wsd.")
    try:
        lr = float(given.get("lr", "1"))
    except ValueError:
        lr = math.nan
    if not (0 < lr < math.inf):
        raise UserError(f"arm {name}: lr is {shown(given['lr'])}; it must be a positive number.")


def _check_recipe(config: RunConfig) -> None:
    """Raise UserError for a recipe whose runs would not all end with a learning rate of 0."""
    never = config.schedule == "constant" or (config.schedule == "wsd" and not config.decay_percent)
    if never or any(stage.lr is not None for stage in recipe_stages(config)):
        raise UserError(
            "The learning rate must fall to 0 at the end of every arm; give --schedule linear, or wsd with a "
            "decay_percent, and stages without lr."
        )
    by_depth: dict[int, set[tuple[int, int]]] = {}
    for stage in recipe_stages(config):
        tokens = stage.tokens_per_step or config.tokens_per_step
        by_depth.setdefault(stage.layers, set()).add((config.length_of(stage), tokens))
    if len({length for kinds in by_depth.values() for length, _ in kinds}) > 1 or max(map(len, by_depth.values())) > 1:
        raise UserError(
            "The recipe's stages differ in sequence_length, or in tokens_per_step at one depth, so no arm of one "
            "depth would be like it; give all stages one length, and one tokens_per_step for each depth."
        )
    if config.trigger != "steps":
        raise UserError(f"trigger {config.trigger} is set; the arms have their own times of growth, so leave it out.")
    parse_operator(config.operator)  # every run has it, whatever its arm grows by


def _check_growths(config: RunConfig, arm: Arm) -> None:
    """Raise UserError where the arm's operator cannot make its depths."""
    if arm.settings.get("schedule") == "wsd" and not config.decay_percent:
        raise UserError(f"arm {arm.name} needs a decay_percent above 0, so that its learning rate falls to 0.")
    parse_operator(arm.settings["operator"])
    for source, target in pairwise(arm.depths):
        if target < source:
            raise UserError(f"arm {arm.name} goes from {source} layers to {target}; a model only grows.")
        if target > source:
            layer_map(arm.settings["operator"], source, target)


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise UserError where scratch's budgets cannot tell what an arm saves."""
    wrong = [budget for budget in budgets if not (math.isfinite(budget) and LEAST <= budget <= 1 / LEAST)]
    if wrong:
        raise UserError(
            f"budgets holds {wrong[0]:g}; give numbers from {LEAST:g} to {1 / LEAST:g}, such as 0.5,0.7,1,1.4."
        )
    labels = set(map(budget_label, budgets))
    if len(labels) < max(4, len(budgets)) or "x1" not in labels or not min(budgets) < 1 < max(budgets):
        raise UserError(
            "budgets must be four or more different positive numbers, 1 among them and others on both sides of it, "
            "such as 0.5,0.7,1,1.4."
        )
    if len(budgets) > MOST_BUDGETS:
        raise UserError(f"budgets holds {len(budgets):,} numbers; give at most {MOST_BUDGETS}.")


def budget_label(budget: float) -> str:
    """What a run of scratch with this budget is called."""
    return f"x{budget:g}"
