"""One optimizer step: gradients cross ranks once, and it is never taken with gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
    """Call `engine.step()`; False where an update was due and no rank made it, since gradients were not finite."""
    before = engine.skipped_steps
    if isinstance(engine.optimizer, SkippingAdamW) and engine.is_gradient_accumulation_boundary():
        engine.optimizer.look()  # before DeepSpeed clips: of a norm beyond fp32 that would make zeros
    engine.step()
    return engine.skipped_steps == before


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that takes no step with gradients that are not finite, and tells DeepSpeed by its attribute `overflow`.

    DeepSpeed's own optimizers look for themselves and agree over ranks. ZeRO stage 0 in fp32 has a plain optimizer,
    whose weights and moments would be spoilt for good; its gradients are the same on all ranks.
    """

    overflow = False

    def look(self) -> None:
        """See whether the gradients are finite, and so are their norms."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()

    def step(self, closure: Any = None) -> Any:
        """The step, or nothing where the last look found that."""
        return None if self.overflow else super().step(closure)
