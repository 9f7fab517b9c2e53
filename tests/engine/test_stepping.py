"""Gradients cross ranks once per optimizer step, however many micro-batches it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds_stacking.engine import stepping
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.models.bert import Bert
from tests.engine.tiny import SEED, factory, model_config, replaced, spec, train
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


def fused_curve(zero_stage: int) -> list[float]:
    """Losses of the fused model; in stage 3 every parameter is gathered when it is used."""
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 0}
    fused = replace(
        factory(zero_stage),
        build_model=lambda layers, initialize: Bert(model_config(), layers, initialize=initialize, fused=True),
        ds_config={"zero_optimization": zero},
    )
    manager = StageManager(fused, seed=SEED)
    manager.start(spec(2, 3))
    losses = train(manager, 0, STEPS)
    manager.grow(spec(4, 3))
    return losses + train(manager, STEPS, STEPS)


def fused_curves() -> list[list[float]]:
    return [fused_curve(zero_stage) for zero_stage in (1, 3)]


def test_fused_kernels_find_what_zero_3_has_partitioned() -> None:
    one, three = run_ranks(2, fused_curves)[0]
    assert three == pytest.approx(one, rel=1e-5)


def test_accumulation_adds_no_reduction() -> None:
    found = run_ranks(2, cases)[0]
    fault, _ = found.pop("fault")
    once, losses = found.pop("ZeRO-1 x 1")
    assert fault == 3 * once  # what the test would see otherwise
    for name, (count, curve) in found.items():
        assert count == once, name
        assert curve == pytest.approx(losses, rel=1e-5), name
