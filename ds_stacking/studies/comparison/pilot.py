"""The pilot of a comparison: a few steps at each depth, which tell what a step costs and prepare the data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, read_json, read_json_lines
from ds_stacking.config import RunConfig
from ds_stacking.studies.comparison.arms import Arm
from ds_stacking.studies.comparison.plan import Cost, pilot_stages
from ds_stacking.training.run_directory import CONFIG, METRICS, SUMMARY

PILOT, PILOT_STEPS = "pilot", 60
"""Its folder, and its steps at each depth, the first third of which is not counted."""
PILOT_OPTIONS = {
    "operator": "last",
    "optimizer_state": "stack",
    "tracking": "none",
    "eval_every": 0,
    "checkpoint_every": 0,
    "log_every": PILOT_STEPS // 12,
}
"""What a pilot is run with, whatever the recipe."""


class PilotStage(TypedDict):
    """A stage in the pilot's config.json."""

    steps: Count


class PilotConfig(TypedDict):
    """The pilot's config.json, beside PILOT_OPTIONS."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    stages: list[PilotStage]


class PilotLine(TypedDict):
    """A line of the pilot's metrics.jsonl."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: str
    layers: Count
    step: Count
    flops: Finite
    training_seconds: NotRequired[Finite]
    cpu_seconds: NotRequired[Finite]


class PilotSummary(TypedDict):
    """The pilot's summary.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    data_fingerprint: str
    seconds: Finite
    training_seconds: Finite


def pilot_options(config: RunConfig, arms: Mapping[str, Arm]) -> list[str]:
    """Options of pretrain.py that make the recipe its pilot, afresh: what stands there may be of a refused recipe."""
    stages = json.dumps([asdict(stage) for stage in pilot_stages(config, arms, PILOT_STEPS)])
    options: dict[str, Any] = {"stages": stages, **PILOT_OPTIONS}
    return [*(f"--{name}={value}" for name, value in options.items()), "--overwrite"]


def is_pilot(folder: Path) -> bool:
    """Whether `folder`/pilot holds a comparison's pilot, of whatever recipe, or no run yet."""
    path = folder / PILOT / CONFIG
    try:
        config = read_json(path, PilotConfig, mend="", inside=folder)
    except FileNotFoundError:
        return True  # --overwrite looks at what else may be there
    except (OSError, UserError):
        return False
    fits = all(config.get(name) == value for name, value in PILOT_OPTIONS.items())
    return fits and all(stage["steps"] == PILOT_STEPS for stage in config["stages"])


def read_summary(run_dir: Path) -> PilotSummary:
    """What the pilot says of its data and its time. Raises UserError where it is damaged."""
    return read_json(run_dir / SUMMARY, PilotSummary, mend=_mend(run_dir), inside=run_dir)


def read_costs(run_dir: Path, clock: str) -> dict[int, Cost]:
    """Cost of a step by depth: FLOPs from the ledger's totals, seconds as the median over a pilot's log lines.

    Raises UserError where the pilot's metrics are damaged or do not tell.
    """
    by_depth: dict[int, list[Any]] = {}
    path, mend = run_dir / METRICS, _mend(run_dir)
    for _, record in read_json_lines(path, PilotLine, mend=mend, inside=run_dir):
        if record["kind"] == "train" and clock in record:
            by_depth.setdefault(record["layers"], []).append(record)
    costs = {}
    for layers, own in sorted(by_depth.items()):
        own = own[len(own) // 3 :]
        pairs = [(a, b) for a, b in pairwise(own) if b["step"] > a["step"]]
        seconds = [(b[clock] - a[clock]) / (b["step"] - a["step"]) for a, b in pairs]
        flops, steps = own[-1]["flops"] - own[0]["flops"], own[-1]["step"] - own[0]["step"]
        if not (pairs and flops > 0 and steps > 0):
            raise UserError(f"{path} does not tell what a step of {layers} layers costs; {mend}.")
        costs[layers] = Cost(flops=flops / steps, seconds=max(statistics.median(seconds), 1e-9))
    return costs


def _mend(run_dir: Path) -> str:
    return f"delete {run_dir}, and the pilot is run again"
