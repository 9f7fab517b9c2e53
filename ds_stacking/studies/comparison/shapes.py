"""Files of a comparison as its report reads them, comparison.json and summary.json of each run, and their names."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.json_files import KEEP_OTHERS
from ds_stacking.reports.run_files import Amount, Number, Text, Whole

VERSION = 2
"""Of comparison.json."""
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


class Versioned(TypedDict):
    """comparison.json of any version."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    version: NotRequired[int]


class Depth(TypedDict):
    """A stage of the recipe."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    layers: Whole
    steps: Whole
    lr: NotRequired[Amount | None]


class Width(TypedDict):
    """The recipe's model."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    hidden_size: Whole


class Recipe(TypedDict):
    """The recipe that all arms share."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    stages: Annotated[list[Depth], Field(max_length=1000)]
    model: Width
    data: Text
    warmup_steps: NotRequired[Whole]


class StepCost(TypedDict):
    """What a step costs at a depth."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    flops: Spent


class Machine(TypedDict):
    """What the comparison was planned on."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    processor: Text
    cores: Whole
    gpus: Annotated[list[Text], Field(max_length=100)]


class ArmPlan(TypedDict):
    """An arm."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: Literal["scratch", "shallow", "grown", "own"]
    meaning: Text
    depths: Annotated[list[Whole], Field(min_length=1, max_length=1000)]
    baseline: Text | None
    lr: NotRequired[Amount | None]


class TunedArm(TypedDict):
    """The learning rates that were tried for an arm."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    rates: Annotated[list[Spent], Field(max_length=1000)]
    chosen: Spent | None


class Tuning(TypedDict):
    """How learning rates were tuned."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    seeds: Seeds
    arms: dict[Name, TunedArm]


class Plan(TypedDict):
    """comparison.json of this version."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    version: Literal[2]
    commit: Text | None
    later_commits: NotRequired[Annotated[list[Text], Field(max_length=1000)]]
    versions: Versions
    later_versions: NotRequired[Annotated[list[Versions], Field(max_length=1000)]]
    recipe: Recipe
    clock: Literal["wall", "cpu"]
    parallel: NotRequired[Whole]
    later_parallel: NotRequired[Annotated[list[Whole], Field(max_length=1000)]]
    machine: NotRequired[Machine]
    costs: NotRequired[Annotated[dict[Text, StepCost], Field(max_length=1000)]]
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
