"""One optimizer step: gradients cross ranks once, and it is never taken with gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.engine.epsilon import count_update, set_epsilon
from ds_stacking.engine.gradients import give
from ds_stacking.engine.optimizers import FlatGradients, sum_type, whole_groups


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
    flat = isinstance(engine.optimizer, FlatGradients)
    if engine.zero_optimization_stage() == 3 or (steps == 1 and not flat):
        for loss in losses:
            engine.backward(loss, scale_wrt_gas=False)
            taken = step_if_finite(engine)
        return taken
    sums: Any = engine.optimizer if flat else HandedOver(engine)
    try:
        with _reduced_once(engine):
            for loss in losses:
                engine.backward(loss, scale_wrt_gas=False)
                sums.add_gradients()
            if not flat:
                sums.hand_over()
    except BaseException:  # whoever goes on with this engine shall not add to half a step
        sums.forget_gradients()
        raise
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
    if isinstance(engine.optimizer, FlatGradients):
        engine.optimizer.reduce_gradients()
    else:
        engine.buffered_allreduce_fallback()


class HandedOver:
    """Sums of micro-batches for an optimizer of DeepSpeed's own: fp32, and rounded into its parameters at the end."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.groups = whole_groups([parameters], torch.float32) if sum_type(engine) else []

    def add_gradients(self) -> None:
        """Take what a backward pass has left in the parameters; without such sums it stays there, and torch adds."""
        for group in self.groups:
            group.add()

    def forget_gradients(self) -> None:
        """Drop them."""
        for group in self.groups:
            group.forget()

    def hand_over(self) -> None:
        """Put the sums where DeepSpeed looks for gradients."""
        for group in self.groups:
            give(group.parameters, group.take())


def step_if_finite(engine: DeepSpeedEngine) -> bool:
    """Call `engine.step()`; False where an update was due and no rank made it, since gradients were not finite."""
    before = engine.skipped_steps
    engine.step()
    return engine.skipped_steps == before
