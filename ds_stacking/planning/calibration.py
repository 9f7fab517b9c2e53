"""How far the planner's kind of estimate is from what a finished run took.

Seconds of a step are fitted as a + b * FLOPs over a run's stages. Each stage is then predicted from the others alone,
so that the error is that of a prediction and not of a fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.config import UserError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a finished run says of its own stages."""

    layers: list[int]
    measured: list[float]
    """Seconds of a step, by stage, waiting for data included."""
    predicted: list[float]
    """Seconds of a step as the other stages predict them."""
    rate: float
    """Model FLOPs per second, from all stages."""

    @property
    def errors(self) -> list[float]:
        """Relative errors of the predictions, by stage."""
        return [p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True)]


def calibrate(run_dir: Path) -> Calibration:
    """Read a run's summary.json. Raises UserError where there is none or it has fewer than three stages."""
    try:
        stages: list[dict[str, Any]] = json.loads((run_dir / "summary.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run_dir} has no summary.json of a finished run; give a run directory.") from None
    if len(stages) < 3:
        raise UserError(f"{run_dir} has {len(stages)} stages; three are needed to predict one from the others.")
    flops = np.array([stage["flops"] / stage["steps"] for stage in stages])
    seconds = np.array([stage["training_seconds"] / stage["steps"] for stage in stages])
    predicted = []
    for left_out in range(len(stages)):
        rest = np.arange(len(stages)) != left_out
        slope, start = np.polyfit(flops[rest], seconds[rest], 1)
        predicted.append(float(start + slope * flops[left_out]))
    return Calibration(
        layers=[stage["layers"] for stage in stages],
        measured=seconds.tolist(),
        predicted=predicted,
        rate=float(sum(s["flops"] for s in stages) / (seconds @ [s["steps"] for s in stages])),
    )
