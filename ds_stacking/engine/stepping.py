"""One optimizer step: gradients cross ranks once, and it is never taken with gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from deepspeed.runtime.engine import DeepSpeedEngine


def optimizer_step(engine: DeepSpeedEngine, losses: Iterable[torch.Tensor]) -> bool:
    """Differentiate the losses of a step's micro-batches, as they are made, and take the step; False if it was not.

    ZeRO stages 1 and 2 sum gradients on each rank and reduce them once; by itself stage 2 would after every
    micro-batch. Stage 3 does, so that no rank holds all gradients.
    """
    taken = False
    if engine.gradient_accumulation_steps() == 1 or engine.zero_optimization_stage() not in (1, 2):
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
            taken = guarded_step(engine)
        return taken
    with engine.coalesce_grad_reduction():
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
    for _ in range(engine.gradient_accumulation_steps()):  # all but the last only count
        taken = guarded_step(engine)
    return taken


def guarded_step(engine: DeepSpeedEngine) -> bool:
    """Call `engine.step()`; False where an update was due and no rank made it, since gradients were not finite.

    DeepSpeed's own optimizers look for themselves and agree over ranks. ZeRO stage 0 in fp32 has a plain optimizer,
    which would spoil weights and moments for good; its gradients are the same on all ranks.
    """
    if hasattr(engine.optimizer, "overflow"):
        before = engine.skipped_steps
        engine.step()
        return engine.skipped_steps == before
    if not engine.is_gradient_accumulation_boundary() or _finite(engine.module):
        engine.step()
        return True
    engine.optimizer.step = lambda *_: None  # hides the method: the engine clears gradients and counts as ever
    try:
        engine.step()
    finally:
        del engine.optimizer.step
    return False


def _finite(module: torch.nn.Module) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
