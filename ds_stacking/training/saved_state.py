"""What a run finds beside its engine's state in a checkpoint: of the types that it reads, or a sentence says where.

A checkpoint may come from somebody else: right checksums say that it is as it was written, not what was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from ds_stacking.checkpoint.format import MANIFEST, STATE
from ds_stacking.checkpoint.manifest import Number
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, parse_json, shown
from ds_stacking.training.ledger import PHASES

EXACTLY = ConfigDict(extra="forbid", strict=True)
"""Of what becomes the fields of a class."""
MEND = "restore it"


def _all_phases(seconds: dict[str, float]) -> dict[str, float]:
    if set(seconds) != set(PHASES):
        raise ValueError(f"it must have the phases {', '.join(PHASES)}")
    return seconds


Phases = Annotated[dict[str, float], AfterValidator(_all_phases)]


class _Position(TypedDict):
    __pydantic_config__ = EXACTLY  # type: ignore[misc]
    step: Number
    stage: Number
    stage_step: Number
    samples: Number


class _StageTotals(TypedDict):
    __pydantic_config__ = EXACTLY  # type: ignore[misc]
    layers: Number
    steps: Number
    tokens: Number
    seconds: float
    training_seconds: float
    flops: float
    train_loss_end: float | None
    eval_loss_end: float | None
    eval_loss_masked_end: float | None


class _Ledger(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    stages: list[_StageTotals]
    phases: Phases
    cpu_phases: Phases


class _Growth(TypedDict):
    __pydantic_config__ = EXACTLY  # type: ignore[misc]
    from_layers: Number
    to_layers: Number
    operator: str
    optimizer_state: str
    stage: Number
    layer_map: list[Number | None]
    seconds: float
    seconds_by_phase: NotRequired[dict[str, float]]
    bytes_moved: int
    bytes_received: int
    tensors_verified: int
    leaked_bytes: int
    eval_loss_before: NotRequired[float | None]
    eval_loss_after: NotRequired[float | None]
    eval_loss_later: NotRequired[float | None]
    observations: NotRequired[list[dict[str, Any]]]


class _Loss(TypedDict):
    __pydantic_config__ = EXACTLY  # type: ignore[misc]
    every: float
    masked: float


class _Health(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    skipped: Number
    in_a_row: Number
    window: list[float]


class _Change(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    step: Number
    field: str


class _Saved(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    position: _Position
    stage_end: bool
    ledger: _Ledger
    growths: list[_Growth]
    evaluated: tuple[Number, Number, _Loss] | None
    stage_steps: Annotated[list[Number], Field(min_length=1)]
    logged_losses: list[tuple[float, float]]
    loss_sum: list[float]
    steps_in_loss: Number
    health: _Health
    changes: NotRequired[list[_Change]]
    metrics_bytes: Number


def check_saved(reader: CheckpointReader) -> None:
    """Raise UserError where a run could not go on with what the checkpoint holds beside the engine's state."""
    text = json.dumps(reader.extra)
    saved = parse_json(text, _Saved, where=f"{reader.path / STATE}, in extra,", mend=MEND)
    position, stages = saved["position"], len(saved["ledger"]["stages"])
    if position["step"] != reader.step:
        raise UserError(
            f"{reader.path / STATE}: extra.position.step is {position['step']}, but the checkpoint is of step "
            f"{reader.step}; {MEND}."
        )
    # a checkpoint that was grown on the disk stands in a stage that the ledger has not begun
    if not position["stage"] <= stages <= position["stage"] + 1 or not stages:
        raise UserError(
            f"{reader.path / STATE}: extra.position.stage is {position['stage']}, but extra.ledger has {stages} "
            f"stages; {MEND}."
        )
    check_settings(reader.manifest.identity, f"{reader.path / MANIFEST}")


def check_settings(identity: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a checkpoint's identity holds no settings by name; older versions saved none."""
    settings = identity.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f"{where}: identity.settings is {shown(settings)}; it must be an object; {MEND}.")
    for name in settings:
        if name.startswith("stages[") and not re.fullmatch(r"stages\[[0-9]{1,6}\]\.\w+", name, re.ASCII):
            raise UserError(f"{where}: identity.settings has {shown(name)}, which is no setting of a stage; {MEND}.")
