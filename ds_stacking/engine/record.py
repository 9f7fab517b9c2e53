"""What a growth did, as a record for the summary, the metrics and the console."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ds_stacking.engine.handover import Handover
from ds_stacking.growth.plan import GrowthPlan


@dataclass(frozen=True, kw_only=True)
class GrowthRecord:
    """What a growth did. Sizes are this rank's."""

    from_layers: int
    to_layers: int
    operator: str
    optimizer_state: str
    stage: int
    """The stage that begins."""
    layer_map: tuple[int | None, ...]
    """Source block of each block; None is a fresh one."""
    seconds: float
    """Wall-clock of the growth without the evaluations."""
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    """check, park (low memory only), build (model and engine), the executor's phases, release."""
    bytes_moved: int
    """fp32 bytes written into the new engine."""
    bytes_received: int
    """Those of them that came from other ranks."""
    tensors_verified: int
    """Target tensors compared with their source."""
    leaked_bytes: int
    """Bytes of the old engine's state that are still in memory."""
    eval_loss_before: float | None = None
    """Held-out loss of the old engine."""
    eval_loss_after: float | None = None
    """Held-out loss of the new engine."""
    eval_loss_later: float | None = None
    """Held-out loss `eval_after_growth` optimizer steps later."""
    observations: list[dict[str, Any]] = field(default_factory=list)
    """What the blocks looked like after 1, 2, 5, 10, ... steps: norms, and cosines of copies with their originals."""


def growth_record(
    plan: GrowthPlan, handover: Handover, *, stage: int, before: float | None = None, after: float | None = None
) -> GrowthRecord:
    """The record of a growth from its plan, its handover and the held-out losses before and after."""
    report = handover.report
    return GrowthRecord(
        from_layers=plan.from_layers,
        to_layers=plan.to_layers,
        operator=plan.operator,
        optimizer_state=plan.optimizer_state,
        stage=stage,
        layer_map=plan.layers,
        seconds=sum(handover.seconds.values()),
        seconds_by_phase=handover.seconds,
        bytes_moved=report.bytes_copied + report.bytes_received,
        bytes_received=report.bytes_received,
        tensors_verified=report.tensors_verified,
        leaked_bytes=handover.leaked_bytes,
        eval_loss_before=before,
        eval_loss_after=after,
    )
