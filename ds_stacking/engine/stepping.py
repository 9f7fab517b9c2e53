"""One optimizer step: gradients cross ranks once, and it is never taken with gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.engine.epsilon import count_update, set_epsilon


def optimizer_step(engine: DeepSpeedEngine, losses: Iterable[torch.Tensor]) -> bool:
    """Differentiate the losses of a step's micro-batches, as they are made, and take the step; False if it was not.

    ZeRO stages 0, 1 and 2 sum gradients on each rank and reduce them once; by itself stage 2 would after every
    micro-batch. Stage 3 does, so that no rank holds all gradients. The sums are fp32 unless the DeepSpeed
    configuration says otherwise (`data_types.grad_accum_dtype`): in bf16 a small gradient is lost beside a large sum.
    """
    set_epsilon(engine.optimizer.param_groups)
    taken = _step(engine, losses)
    if taken:
        count_update(engine.optimizer.param_groups)
    return taken


def _step(engine: DeepSpeedEngine, losses: Iterable[torch.Tensor]) -> bool:
    taken = False
    steps = engine.gradient_accumulation_steps()
    stage = engine.zero_optimization_stage()
    if steps == 1 or stage == 3:
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
            taken = step_if_finite(engine)
        return taken
    with _reduced_once(engine), _summed_in_fp32(engine):
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
    for _ in range(steps):  # all but the last only count
        taken = step_if_finite(engine)
    return taken


@contextmanager
def _reduced_once(engine: DeepSpeedEngine) -> Iterator[None]:
    """Leave gradients where they are inside, and reduce them over ranks at the end."""
    if engine.zero_optimization_stage() > 0:
        with engine.coalesce_grad_reduction():
            yield
        return
    with engine.no_sync():
        yield
    engine.buffered_allreduce_fallback()


@contextmanager
def _summed_in_fp32(engine: DeepSpeedEngine) -> Iterator[None]:
    """Sum the 16-bit gradients of the backward passes inside in fp32, and round the sums once, at the end.

    A parameter's gradient is added and freed as soon as a backward pass has made it, so that a rank holds 4 bytes per
    parameter and no more.
    """
    if not engine.bfloat16_enabled() or engine._config.grad_accum_dtype == "bf16":
        yield
        return
    sums: dict[torch.Tensor, torch.Tensor] = {}

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if parameter in sums:
            sums[parameter].add_(parameter.grad)
        else:
            sums[parameter] = parameter.grad.float()
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(add) for p in engine.module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for parameter in list(sums):
        parameter.grad = sums.pop(parameter).to(parameter.dtype)


def step_if_finite(engine: DeepSpeedEngine) -> bool:
    """Call `engine.step()`; False where an update was due and no rank made it, since gradients were not finite.

    DeepSpeed's own optimizers look for themselves and agree over ranks. ZeRO stage 0 in fp32 has a plain optimizer,
    which would spoil weights and moments for good; its gradients are the same on all ranks.
    """
    if hasattr(engine.optimizer, "overflow"):
        before = engine.skipped_steps
        engine.step()
        return engine.skipped_steps == before
    taken = not engine.is_gradient_accumulation_boundary() or _finite(engine.module)
    if not taken:
        engine.zero_grad()  # the engine counts as ever, and AdamW passes over parameters without a gradient
    engine.step()
    return taken


def _finite(module: torch.nn.Module) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
