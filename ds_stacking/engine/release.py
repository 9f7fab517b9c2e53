"""Freeing an engine for good.

DeepSpeed's own `destroy` leaves the flat buffers alive through reference cycles, and under ZeRO-3 the module itself
through a global list. Here the buffers go at once, whoever still holds the engine.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor

from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.state import KINDS


def release(engine: DeepSpeedEngine) -> None:
    """Free an engine's state, weights and gradients; its module is an empty shell afterwards."""
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        tensor.grad = None
        tensor.data = tensor.data.new_empty(0)
        vars(tensor).clear()  # DeepSpeed's shards and methods, which refer back to the optimizer
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    base.state.clear()
    base.param_groups.clear()
    if base is not optimizer:
        vars(optimizer).clear()
    engine.optimizer = engine.basic_optimizer = None


def collect() -> None:
    """Collect what a released engine's reference cycles held, on the device too."""
    gc.collect()
    get_accelerator().empty_cache()


def state_references(engine: DeepSpeedEngine) -> list[weakref.ref[Tensor]]:
    """Weak references to the tensors that hold an engine's masters and moments."""
    state = LiveState(engine)
    masters = {fragment.master for fragment in state.fragments.values()}
    tensors = [state.base.state[master][kind] for master in masters for kind in KINDS if kind != "master"]
    return [weakref.ref(tensor) for tensor in (*masters, *tensors)]


def warn_of_leaks(watched: Sequence[weakref.ref[Tensor]]) -> int:
    """Warn where a released engine's tensors still hold memory; returns the bytes."""
    if any(reference() is not None for reference in watched):
        collect()  # seconds in a large program, so only where something is left
    alive = [tensor for reference in watched if (tensor := reference()) is not None]
    held = sum(tensor.untyped_storage().nbytes() for tensor in alive)
    if held:
        warnings.warn(
            f"{held:,} bytes of the engine that was replaced are still in memory; something in this program holds its "
            f"optimizer's tensors, and every growth will add as much.",
            stacklevel=3,
        )
    return held
