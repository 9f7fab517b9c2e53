"""How far the planner's kind of estimate is from what a finished run took.

Seconds of a step are fitted as a + b * FLOPs over a run's stages. Each stage is then predicted from the others alone,
so that the error is that of a prediction and not of a fit. A stage is measured between its first and last logged
step, which leaves warm-up out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, read_json, read_json_lines
from ds_stacking.common.words import shown

CLOCKS = {"training_seconds": "wall clock", "cpu_seconds": "processor time, the fair one on a shared CPU"}
"""Fields of a training record that tell the time, and their names."""


MOST_STAGES = 1000
Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e39)]
Whole = Annotated[int, Field(ge=0, le=2**53)]


class Summary(TypedDict):
    """summary.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    finished: bool


class Line(TypedDict):
    """A line of metrics.jsonl."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: str
    step: Whole
    stage: NotRequired[Whole]
    layers: NotRequired[Whole]
    flops: NotRequired[Amount]
    training_seconds: NotRequired[Amount]
    cpu_seconds: NotRequired[Amount]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a finished run says of its own stages, by one clock."""

    clock: str
    layers: list[int]
    measured: list[float]
    """Seconds of a step, by stage, waiting for data included."""
    predicted: list[float]
    """Seconds of a step as the other stages predict them."""

    @property
    def errors(self) -> list[float]:
        """Relative errors of the predictions, by stage."""
        return [p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True)]


def calibrate(run: str | Path) -> list[Calibration]:
    """Read a run's metrics.jsonl, by each clock.

    Raises UserError where there is no finished run, its files are damaged, or it tells of fewer than three stages.
    """
    name, run_dir = shown(str(run)), Path(run)
    try:
        if not str(run).strip() or not os.path.isdir(run_dir):
            raise UserError(f"--run {name} is no folder; give the directory of a finished run.")
        summary = read_json(run_dir / "summary.json", Summary, mend="give another run", inside=run_dir, limit=1 << 26)
        if not summary["finished"]:
            raise UserError(f"--run {name} has not finished; wait for its end, or give another.")
        stages = [found for found in _ends(run_dir) if found[1]["step"] > found[0]["step"]]
    except OSError as error:
        missing = Path(error.filename or run_dir).name
        raise UserError(
            f"--run {name} has no {missing} of a finished run ({error.strerror}); give the directory of one."
        ) from None
    if len(stages) < 3:
        raise UserError(f"--run {name} has {len(stages)} stages; three are needed to predict one from the others.")
    try:
        return [_calibrate(stages, clock) for clock in CLOCKS]
    except KeyError as error:
        raise UserError(f"{run_dir / 'metrics.jsonl'} tells no {error} of its steps; give another run.") from None


def _ends(run_dir: Path) -> list[list[Any]]:
    """The first and the last training record of every stage."""
    ends: dict[int, list[Any]] = {}
    for _, record in read_json_lines(run_dir / "metrics.jsonl", Line, mend="give another run", inside=run_dir):
        if record["kind"] != "train" or "stage" not in record:
            continue
        if record["stage"] not in ends and len(ends) == MOST_STAGES:
            raise UserError(f"{run_dir} tells of more than {MOST_STAGES:,} stages; give another run.")
        ends.setdefault(record["stage"], [record, record])[1] = record
    return list(ends.values())


def _calibrate(stages: list[list[Any]], clock: str) -> Calibration:
    seconds, flops = (_per_step(stages, name) for name in (clock, "flops"))
    if min(seconds) <= 0 or np.ptp(flops) == 0:
        raise UserError(f"The stages of --run do not tell what their steps cost by {CLOCKS[clock]}; give another run.")
    predicted = []
    for left_out in range(len(stages)):
        rest = np.arange(len(stages)) != left_out
        slope, start = np.polyfit(flops[rest], seconds[rest], 1)
        predicted.append(float(start + slope * flops[left_out]))
    layers = [found[0]["layers"] for found in stages]
    return Calibration(clock=CLOCKS[clock], layers=layers, measured=seconds.tolist(), predicted=predicted)


def _per_step(stages: list[list[Any]], name: str) -> np.ndarray:
    """Growth of a cumulative field per optimizer step, by stage."""
    return np.array([(s[-1][name] - s[0][name]) / (s[-1]["step"] - s[0]["step"]) for s in stages])
