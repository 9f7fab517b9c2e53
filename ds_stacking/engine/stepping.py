"""One optimizer step that is never taken with gradients that are not finite, whatever DeepSpeed's layout."""

from __future__ import annotations

import torch
from deepspeed.runtime.engine import DeepSpeedEngine


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
