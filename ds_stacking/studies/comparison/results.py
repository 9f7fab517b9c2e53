"""Statistics of a comparison of arms: what each saves at equal loss, and gains at equal cost, against scratch.

Only ends of runs whose learning rate has fallen to 0 are compared (No Train No Gain: Kaddour et al. 2023, 2307.06440).
Scratch has one end for each of its budgets; between two of them its loss is taken to be linear in the logarithm of the
cost, and outside them nothing is claimed. Differences are taken seed by seed, since equal seeds mean equal data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

import numpy as np
from pydantic import Field
from scipy import stats
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.common.own_files import read_inside
from ds_stacking.common.words import plain, shown
from ds_stacking.reports.run_files import Amount, Number, Text, Whole

LEVEL = 0.95
"""Level of the intervals."""
SECONDS = {"wall": "training_seconds", "cpu": "cpu_seconds"}
"""The field of a summary that holds the seconds of a comparison's clock."""
PATH = re.compile(
    r"[A-Za-z][A-Za-z0-9_]{0,39}/(flops|time|x[0-9]{1,9}(\.[0-9]{1,9})?(e[+-][0-9]{2})?)/seed-[0-9]{1,10}"
)
"""What a run is called: arm, label and seed. Scratch's labels are its budgets, those of the others what they match."""
Spent = Annotated[float, Field(allow_inf_nan=False, ge=1e-12, le=1e39)]
"""What a run that ended has spent; it is divided by."""
Frontier = Sequence[tuple[float, float]]
"""Cost and loss of scratch's ends, by rising cost."""


class Depth(TypedDict):
    """A stage of the recipe."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    layers: Whole
    steps: Whole


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


class Plan(TypedDict):
    """comparison.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    recipe: Recipe
    clock: Literal["wall", "cpu"]
    arms: dict[Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]{0,39}$")], Text]
    runs: Annotated[dict[str, Any], Field(max_length=100_000)]


class EndOfRun(TypedDict):
    """summary.json of one of the runs."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    finished: bool
    eval_loss_masked: NotRequired[Number | None]
    steps: Whole
    tokens: Amount
    flops: Spent
    training_seconds: Spent
    cpu_seconds: Spent
    data_fingerprint: Text


@dataclass(frozen=True, kw_only=True)
class End:
    """Where one run ended."""

    arm: str
    """Name of the arm."""
    label: str
    """`flops` or `time`, what it matches; for scratch its budget, such as x0.7."""
    seed: int
    """Its seed."""
    loss: float
    """Held-out loss on [MASK] positions, in nats."""
    steps: int
    """Optimizer steps."""
    tokens: float
    """Tokens trained on."""
    flops: float
    """Model FLOPs."""
    seconds: float
    """Seconds of training by the comparison's clock: without start, evaluations and checkpoints."""
    data: str
    """Fingerprint of the data; only runs on the same data are compared."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A quantity over seeds."""

    values: list[float | None]
    """One for each seed; None where scratch's ends do not enclose it."""
    mean: float | None
    """Mean; None where any seed has no value, since leaving seeds out would flatter."""
    low: float | None
    """Lower end of the paired t-interval; None with fewer than two seeds."""
    high: float | None
    """Its upper end."""


@dataclass(kw_only=True)
class Results:
    """What a comparison's directory holds."""

    folder: Path
    """The directory."""
    plan: dict[str, Any]
    """`comparison.json`."""
    ends: list[End] = field(default_factory=list)
    """Ends of all finished runs."""
    failed: dict[str, str] = field(default_factory=dict)
    """Runs that failed, with the reason."""
    missing: list[str] = field(default_factory=list)
    """Planned runs that have not finished."""
    without_curve: dict[str, str] = field(default_factory=dict)
    """Runs whose metrics cannot be read, with the reason."""

    def of(self, arm: str, label: str) -> dict[int, End]:
        """Ends of an arm's runs by seed; what matches the time may be the run that matches the FLOPs."""
        found = {end.seed: end for end in self.ends if (end.arm, end.label) == (arm, label)}
        return self.of(arm, "flops") | found if label == "time" else found

    def frontier(self, end: End, cost: str) -> list[tuple[float, float]]:
        """Scratch's ends with the seed and the data of `end`: `cost` (flops, tokens or seconds) and loss."""
        like = [e for e in self.ends if e.arm == "scratch" and (e.seed, e.data) == (end.seed, end.data)]
        return sorted((getattr(e, cost), e.loss) for e in like)

    def saving(self, arm: str, cost: str) -> Effect:
        """Share of `cost` that the arm saves where scratch reaches the same loss."""
        return effect(
            [
                None
                if (same := cost_at(self.frontier(end, cost), end.loss)) is None
                else 1 - getattr(end, cost) / same
                for _, end in sorted(self.of(arm, label_of(cost)).items())
            ]
        )

    def least_saving(self, arm: str, cost: str) -> float | None:
        """What the arm saves at the least where in every seed no budget of scratch reached its loss, else None."""
        bounds = []
        for end in self.of(arm, label_of(cost)).values():
            frontier = self.frontier(end, cost)
            if not frontier or end.loss >= min(loss for _, loss in frontier):
                return None
            bounds.append(1 - getattr(end, cost) / frontier[-1][0])
        return min(bounds, default=None)

    def gain(self, arm: str, cost: str) -> Effect:
        """Nats by which the arm's loss lies below scratch's at the same `cost`."""
        return effect(
            [
                None if (same := loss_at(self.frontier(end, cost), getattr(end, cost))) is None else same - end.loss
                for _, end in sorted(self.of(arm, label_of(cost)).items())
            ]
        )


def label_of(cost: str) -> str:
    """Which of an arm's runs tells about a cost: that of equal time about seconds, that of equal FLOPs otherwise."""
    return "time" if cost == "seconds" else "flops"


def read_comparison(folder: str | Path) -> Results:
    """Read a comparison's directory. Raises UserError where it is none; a run whose files are damaged has failed."""
    folder = Path(folder)
    try:
        path = folder / "comparison.json"
        plan = read_json(path, Plan, mend="restore it, or compare in another --output_dir", inside=folder)
    except OSError:
        raise UserError(f"{folder} holds no comparison; give the output_dir of compare.py.") from None
    for name in plan["runs"]:
        if not PATH.fullmatch(name) or name.startswith("scratch/") != ("/x" in name):
            raise UserError(f"{path}: runs names {shown(name)}, which is none of compare.py's; restore the file.")
    results = Results(folder=folder, plan=cast(dict[str, Any], plan))
    for name in plan["runs"]:
        _read_run(results, name)
    return results


def _read_run(results: Results, name: str) -> None:
    """Note where a run has ended, why it failed, or that it is missing."""
    try:
        summary = read_json(
            results.folder / name / "summary.json", EndOfRun, mend="restore it", inside=results.folder, limit=1 << 26
        )
    except OSError:
        failure = _failure(results.folder, f"{name}.failed")
        if failure is None:
            results.missing.append(name)
        else:
            results.failed[name] = failure
    except UserError as error:
        results.failed[name] = plain(str(error)).rstrip(".")
    else:
        if summary["finished"] and summary.get("eval_loss_masked") is not None:
            results.ends.append(_end(name, summary, SECONDS[results.plan["clock"]]))
        else:
            results.missing.append(name)


def _failure(folder: Path, name: str) -> str | None:
    """What the runner noted of a run that failed."""
    try:
        return plain(read_inside(folder, name, limit=1 << 16).decode(errors="replace"))
    except OSError:
        return None
    except UserError as error:
        return plain(str(error)).rstrip(".")


def _end(path: str, summary: Mapping[str, Any], seconds: str) -> End:
    arm, label, seed = path.split("/")
    return End(
        arm=arm,
        label=label,
        seed=int(seed.removeprefix("seed-")),
        loss=summary["eval_loss_masked"],
        steps=summary["steps"],
        tokens=summary["tokens"],
        flops=summary["flops"],
        seconds=summary[seconds],
        data=summary["data_fingerprint"],
    )


def loss_at(frontier: Frontier, cost: float) -> float | None:
    """Scratch's loss at a cost, or None outside its budgets."""
    for (low, first), (high, last) in pairwise(frontier):
        if low <= cost <= high:
            return first + (last - first) * math.log(cost / low) / math.log(high / low) if high > low else first
    return None


def cost_at(frontier: Frontier, loss: float) -> float | None:
    """What scratch spends to reach a loss, or None outside its ends, and where more cost did not lower its loss."""
    if any(last >= first for (_, first), (_, last) in pairwise(frontier)):
        return None
    for (low, first), (high, last) in pairwise(frontier):
        if last <= loss <= first:
            return low * (high / low) ** ((first - loss) / (first - last))
    return None


def effect(values: list[float | None]) -> Effect:
    """Mean and t-interval of values that stand for one seed each."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Effect(values=values, mean=None, low=None, high=None)
    mean = float(np.mean(known))
    if len(known) < 2 or np.ptp(known) == 0:
        return Effect(values=values, mean=mean, low=None, high=None)
    interval = stats.ttest_1samp(known, 0.0).confidence_interval(LEVEL)
    return Effect(values=values, mean=mean, low=float(interval.low), high=float(interval.high))
