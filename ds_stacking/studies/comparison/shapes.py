"""Files of a comparison: comparison.json, summary.json of each run, and their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, read_json
from ds_stacking.common.words import shown
from ds_stacking.reports.run_files import Amount, Number, Text, Whole

PLAN, VERSION = "comparison.json", 2
"""The file of the plan, and its version."""
CLOCKS = {"wall": "wall clock", "cpu": "processor time"}
"""What a comparison's time may be, in words."""
SECONDS = {"wall": "training_seconds", "cpu": "cpu_seconds"}
"""The field of a summary, and of a record of metrics, that holds the seconds of a comparison's clock."""
NAME = "[A-Za-z][A-Za-z0-9_]{0,39}"
"""What an arm may be called."""
NUMBER = r"[0-9]{1,9}(\.[0-9]{1,9})?(e[+-][0-9]{2})?"
LABELS = {
    "scratch": re.compile(f"x{NUMBER}"),
    "shallow": re.compile("flops"),
    "grown": re.compile("flops|time"),
    "own": re.compile("flops|time"),
}
"""What runs of each kind of arm are called: scratch by its budget, the others by what they match."""
TUNING = re.compile(f"lr{NUMBER}")
"""What a run that tunes a learning rate is called, in every kind of arm."""
PATH = re.compile(rf"({NAME})/(flops|time|x{NUMBER}|lr{NUMBER})/seed-([0-9]{{1,10}})")
"""What a run is called: arm, label and seed."""
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
"""Of an arm."""
Spent = Annotated[float, Field(allow_inf_nan=False, ge=1e-12, le=1e39)]
"""What a run that ended has spent; it is divided by."""
Versions = Annotated[dict[Text, Text], Field(max_length=100)]
Seeds = Annotated[list[Whole], Field(max_length=100_000)]


class Depth(TypedDict):
    """A stage of the recipe."""

    layers: Whole
    steps: Whole
    lr: NotRequired[Amount | None]


class Width(TypedDict):
    """The recipe's model."""

    hidden_size: Whole


class Recipe(TypedDict):
    """The recipe that all arms share."""

    stages: Annotated[list[Depth], Field(max_length=1000)]
    model: Width
    corpus: NotRequired[dict[str, Any]]
    optimizer: NotRequired[dict[str, Any]]
    data: Text
    warmup_steps: NotRequired[Whole]


class StepCost(TypedDict):
    """What a step costs at a depth."""

    flops: Spent
    seconds: Spent


class Machine(TypedDict):
    """What the comparison was planned on."""

    processor: Text
    cores: Whole
    gpus: Annotated[list[Text], Field(max_length=100)]


class ArmPlan(TypedDict):
    """An arm."""

    kind: Literal["scratch", "shallow", "grown", "own"]
    meaning: Text
    depths: Annotated[list[Whole], Field(min_length=1, max_length=1000)]
    baseline: Text | None
    lr: NotRequired[Amount | None]
    settings: NotRequired[dict[Text, Text]]


class TunedArm(TypedDict):
    """The learning rates that were tried for an arm."""

    rates: Annotated[list[Spent], Field(max_length=1000)]
    chosen: Spent | None


class Tuning(TypedDict):
    """How learning rates were tuned."""

    seeds: Seeds
    arms: dict[Name, TunedArm]


class Plan(TypedDict):
    """comparison.json: what is planned, and what was found out meanwhile."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    version: Literal[2]
    commit: Text | None
    later_commits: Annotated[list[Text], Field(max_length=1000)]
    versions: Versions
    later_versions: NotRequired[Annotated[list[Versions], Field(max_length=1000)]]
    recipe: Recipe
    clock: Literal["wall", "cpu"]
    parallel: NotRequired[Count]
    later_parallel: NotRequired[Annotated[list[Count], Field(max_length=1000)]]
    machine: NotRequired[Machine]
    minutes: Finite | None
    unit: Spent
    overhead: Finite
    costs: Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], StepCost], Field(max_length=1000)]
    data_fingerprint: Text
    budgets: Annotated[list[Spent], Field(max_length=1000)]
    added_budgets: NotRequired[Annotated[list[Spent], Field(max_length=1000)]]
    added_arms: NotRequired[Annotated[list[Name], Field(max_length=100)]]
    seeds: Seeds
    added_seeds: Seeds
    arms: Annotated[dict[Name, ArmPlan], Field(max_length=100)]
    tuning: Tuning | None
    runs: Annotated[
        dict[str, Annotated[list[Annotated[list[Whole], Field(min_length=2, max_length=2)]], Field(max_length=1000)]],
        Field(max_length=100_000),
    ]


class EndOfRun(TypedDict):
    """summary.json of one of the runs."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    finished: bool
    eval_loss_masked: NotRequired[Number | None]
    eval_loss_shuffled: NotRequired[Number | None]
    unigram_cross_entropy: NotRequired[Number | None]
    cache_loss: NotRequired[Number | None]
    steps: Whole
    tokens: Spent
    flops: Spent
    training_seconds: Spent
    cpu_seconds: Spent
    data_fingerprint: Text


def read_plan(folder: Path) -> Plan | None:
    """The plan of the comparison in `folder`; None where there is none. Raises UserError for what is damaged."""
    path, mend = folder / PLAN, "restore it, or choose another --output_dir"
    try:
        version = read_json(path, dict[str, Any], mend=mend, inside=folder).get("version", 1)
        if version == VERSION:
            plan = read_json(path, Plan, mend=mend, inside=folder)
            _check_plan(path, plan)
            return plan
    except (FileNotFoundError, NotADirectoryError):
        return None
    raise UserError(
        f"{path} is of version {shown(version)}, and this program reads version {VERSION}; use the program that made "
        f"it, or choose another --output_dir."
    )


def _check_plan(path: Path, plan: Plan) -> None:
    """Raise UserError where runs or baselines of the plan are none of compare.py's."""
    for name in plan["runs"]:
        match = PATH.fullmatch(name)
        arm = plan["arms"].get(match[1]) if match else None
        if not (match and arm and (LABELS[arm["kind"]].fullmatch(match[2]) or TUNING.fullmatch(match[2]))):
            raise UserError(f"{path}: runs names {shown(name)}, which is none of compare.py's; restore the file.")
    scratch = [name for name, arm in plan["arms"].items() if arm["kind"] == "scratch"]
    for name, arm in plan["arms"].items():
        baseline = arm["baseline"]
        if baseline is not None and baseline not in scratch:
            raise UserError(
                f"{path}: the baseline of {name} is {shown(baseline)}, no arm of kind scratch; restore it."
            )
