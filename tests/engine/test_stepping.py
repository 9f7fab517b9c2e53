"""Gradients cross ranks once per optimizer step, however many micro-batches it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.engine import stepping
from ds_stacking.engine.factory import EngineSpec
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.models.bert import Bert
from ds_stacking.models.variants import bert_class
from tests.engine.tiny import (
    LENGTH,
    OPTIMIZER,
    SEED,
    VOCABULARY,
    factory,
    model_config,
    part_loss,
    replaced,
    spec,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 3


def reductions(zero_stage: int, accumulation: int, offload: bool) -> tuple[float, list[float]]:
    """Elements of gradients that cross ranks per optimizer step, and the losses."""
    manager = StageManager(factory(zero_stage, offload=offload), seed=SEED)
    engine = manager.start(spec(2, accumulation))
    elements, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        elements.append(tensor.numel() if tensor.numel() > 1 else 0)  # norms are single numbers
        return all_reduce(tensor, *args, **kwargs)

    with replaced(dist, "all_reduce", counted):
        losses = train(manager, 0, STEPS)
    assert engine.global_steps == STEPS
    return sum(elements) / STEPS, losses


def cases() -> dict[str, tuple[float, list[float]]]:
    found = {
        f"ZeRO-{zero_stage}{' offload' * offload} x {accumulation}": reductions(zero_stage, accumulation, offload)
        for zero_stage, offload in ((0, False), (1, False), (2, False), (2, True))
        for accumulation in (1, 3)
    }

    def every_micro_batch(engine: Any, losses: Any) -> None:
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
            stepping.step_if_finite(engine)

    with replaced(train.__globals__["stepping"], "optimizer_step", every_micro_batch):
        found["fault"] = reductions(2, 3, True)
    return found


def fused_curve(zero_stage: int) -> list[float]:
    """Losses of the fused model; in stage 3 every parameter is gathered when it is used."""
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 0}
    fused = replace(
        factory(zero_stage),
        build_model=lambda layers, initialize: bert_class(True)(model_config(), layers, initialize=initialize),
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
    _, losses = found["ZeRO-1 x 1"]
    assert fault == 3 * found["ZeRO-2 offload x 1"][0]  # what the test would see otherwise
    for name, (elements, curve) in found.items():
        once, _ = found[f"{name.partition(' x ')[0]} x 1"]
        assert elements == once > 0, name
        assert curve == pytest.approx(losses, rel=1e-5), name


MANY = 48
"""Micro-batches of one step on one rank."""


def sequence(index: int) -> tuple[Tensor, Tensor]:
    """Tokens [1, LENGTH] and which of them are predicted."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + index)
    tokens = torch.randint(5, VOCABULARY, (1, LENGTH), generator=generator)
    return tokens, torch.arange(LENGTH)[None] % 4 == 0


def exact_gradients(engine: Any) -> dict[str, Tensor]:
    """The same bf16 gradients of all micro-batches and ranks, summed in fp64."""
    parameters = dict(engine.module.named_parameters())
    model = Bert(model_config(), len(engine.module.blocks)).bfloat16()
    whole = deepspeed.zero.GatheredParameters if engine.zero_optimization_stage() == 3 else nullcontext
    for name, parameter in model.named_parameters():
        with whole(parameters[name]):
            parameter.data.copy_(parameters[name].data)
    sums = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}
    for index in range(MANY):
        model.zero_grad()
        part_loss(model, *sequence(index), LENGTH // 4).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.flatten().double()
    for total in sums.values():
        dist.all_reduce(total)
    return sums


def error_of_sums(zero_stage: int, dtype: str | None) -> float:
    """Relative error of the gradient that the optimizer saw in the first step after a growth."""
    zero = {"stage": zero_stage}
    asked = {"data_types": {"grad_accum_dtype": dtype}} if dtype else {}
    engines = replace(
        factory(zero_stage, bf16=True),
        ds_config={"zero_optimization": zero, **asked},
        optimizer=replace(OPTIMIZER, clip=0.0),
    )
    manager = StageManager(engines, seed=SEED)
    manager.start(EngineSpec(layers=1, micro_batch_size=1, accumulation=MANY))
    manager.grow(EngineSpec(layers=2, micro_batch_size=1, accumulation=MANY), optimizer_state="reset")
    engine = manager.engine
    exact = exact_gradients(engine)

    def losses() -> Iterator[Tensor]:
        for index in range(MANY):
            yield part_loss(engine, *sequence(index), LENGTH // 4) * dist.get_world_size()

    assert stepping.optimizer_step(engine, losses()) and engine.global_steps == 1
    state = LiveState(engine)
    wrong, right = torch.zeros(2, dtype=torch.float64).unbind()
    for piece in state.slices():
        expected = exact[piece.name][piece.start : piece.stop]
        found = state.read(piece, "exp_avg").double() / (1 - OPTIMIZER.betas[0])
        wrong += (found - expected).square().sum()
        right += expected.square().sum()
    both = torch.stack([wrong, right])
    dist.all_reduce(both)
    release(engine)
    collect()
    return float((both[0] / both[1]).sqrt())


def errors() -> dict[tuple[int, str | None], float]:
    return {(stage, dtype): error_of_sums(stage, dtype) for stage in range(4) for dtype in (None, "fp32", "bf16")}


@pytest.mark.slow
def test_gradients_of_many_micro_batches_are_summed_in_fp32() -> None:
    found = run_ranks(2, errors)[0]
    print({case: f"{100 * error:.2f} %" for case, error in found.items()})
    for stage in range(4):
        assert found[stage, None] == found[stage, "fp32"] < 0.003, stage
        assert found[stage, "bf16"] > 1.5 * found[stage, None], stage
