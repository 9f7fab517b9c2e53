"""Gradients cross ranks once per optimizer step, however many micro-batches it has."""

from __future__ import annotations

from typing import Any

import pytest

from ds_stacking.engine import stepping
from ds_stacking.engine.stage_manager import StageManager
from tests.engine.tiny import SEED, factory, replaced, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 3


def reductions(zero_stage: int, accumulation: int, offload: bool) -> tuple[float, list[float]]:
    """Reductions of gradients per optimizer step, and the losses."""
    manager = StageManager(factory(zero_stage, offload=offload), seed=SEED)
    engine = manager.start(spec(2, accumulation))
    calls, average = [], engine.optimizer.average_tensor

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return average(*args, **kwargs)

    with replaced(engine.optimizer, "average_tensor", counted):
        losses = train(manager, 0, STEPS)
    assert engine.global_steps == STEPS
    return len(calls) / STEPS, losses


def cases() -> dict[str, tuple[float, list[float]]]:
    found = {
        f"ZeRO-{zero_stage}{' offload' * offload} x {accumulation}": reductions(zero_stage, accumulation, offload)
        for zero_stage, offload in ((1, False), (2, False), (2, True))
        for accumulation in (1, 3)
    }

    def every_micro_batch(engine: Any, losses: Any) -> None:
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
            stepping.guarded_step(engine)

    with replaced(train.__globals__["stepping"], "optimizer_step", every_micro_batch):
        found["fault"] = reductions(2, 3, False)
    return found


def test_accumulation_adds_no_reduction() -> None:
    found = run_ranks(2, cases)[0]
    fault, _ = found.pop("fault")
    once, losses = found.pop("ZeRO-1 x 1")
    assert fault == 3 * once  # what the test would see otherwise
    for name, (count, curve) in found.items():
        assert count == once, name
        assert curve == pytest.approx(losses, rel=1e-5), name
