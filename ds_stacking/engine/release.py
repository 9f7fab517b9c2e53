"""Freeing an engine for good, and counting what is alive.

DeepSpeed's own `destroy` leaves the flat buffers alive through reference cycles, and under ZeRO-3 the module itself
through a global list. Here the buffers go at once, whoever still holds the engine.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

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


def watch(engine: DeepSpeedEngine) -> list[weakref.ref[Tensor]]:
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


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What is alive in this process."""

    parameters: int
    """torch parameters."""
    modules: int
    """torch modules."""
    hooks: int
    """Hooks on them."""
    process_groups: int
    """Process groups, the default one included."""
    host_bytes: int
    """Bytes of distinct tensor storages on the host."""
    pinned_bytes: int
    """Those of them in page-locked memory."""
    device_bytes: int
    """Bytes that tensors occupy on the accelerator; 0 on a CPU."""


def footprint() -> Footprint:
    """Collect garbage, then count. Tensors that only C++ refers to are not seen on the host."""
    collect()
    tensors: list[Tensor] = []
    modules: list[nn.Module] = []
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, Tensor):
            tensors.append(thing)
        elif issubclass(kind, nn.Module):
            modules.append(thing)
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    accelerator = get_accelerator()
    on_host = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    cuda = accelerator.device_name() == "cuda"
    return Footprint(
        parameters=len(parameters),
        modules=len(modules),
        hooks=sum(map(_hooks, parameters)) + sum(map(_hooks, modules)),
        process_groups=dist.distributed_c10d.get_pg_count() if dist.is_initialized() else 0,
        host_bytes=_bytes(on_host),
        pinned_bytes=_bytes([t for t in on_host if t.is_pinned()]) if cuda else 0,
        device_bytes=accelerator.memory_allocated() if cuda else 0,
    )


def _hooks(thing: Tensor | nn.Module) -> int:
    kinds = ("forward", "forward_pre", "backward", "backward_pre", "post_accumulate_grad")
    return sum(len(getattr(thing, f"_{kind}_hooks", None) or ()) for kind in kinds)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())
