"""How far the planner's kind of estimate is from what a finished run took.

Seconds of a step are fitted as a + b * FLOPs over a run's stages. Each stage is then predicted from the others alone,
so that the error is that of a prediction and not of a fit. A stage is measured between its first and last logged
step, which leaves warm-up out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.common.errors import UserError

CLOCKS = {"training_seconds": "wall clock", "cpu_seconds": "processor time, the fair one on a shared CPU"}
"""Fields of a training record that tell the time, and their names."""


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


def calibrate(run_dir: Path) -> list[Calibration]:
    """Read a run's metrics.jsonl, by each clock. Raises UserError where it tells of fewer than three stages."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run_dir} has no metrics.jsonl of a run; give a run directory.") from None
    by_stage: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_stage.setdefault(record["stage"], []).append(record)
    stages = [found for found in by_stage.values() if found[-1]["step"] > found[0]["step"]]
    if len(stages) < 3:
        raise UserError(f"{run_dir} has {len(stages)} stages; three are needed to predict one from the others.")
    return [_calibrate(stages, clock) for clock in CLOCKS]


def _calibrate(stages: list[list[dict[str, Any]]], clock: str) -> Calibration:
    seconds, flops = (_per_step(stages, name) for name in (clock, "flops"))
    predicted = []
    for left_out in range(len(stages)):
        rest = np.arange(len(stages)) != left_out
        slope, start = np.polyfit(flops[rest], seconds[rest], 1)
        predicted.append(float(start + slope * flops[left_out]))
    layers = [found[0]["layers"] for found in stages]
    return Calibration(clock=CLOCKS[clock], layers=layers, measured=seconds.tolist(), predicted=predicted)


def _per_step(stages: list[list[dict[str, Any]]], name: str) -> np.ndarray:
    """Growth of a cumulative field per optimizer step, by stage."""
    return np.array([(s[-1][name] - s[0][name]) / (s[-1]["step"] - s[0]["step"]) for s in stages])
