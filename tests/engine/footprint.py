"""What is alive in this process: counted before and after growths."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_stacking.engine.release import collect


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
