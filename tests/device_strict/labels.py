"""Which memory is the device's: labels on storages, and the rules by which CUDA and NCCL refuse a mixture.

Tensors of the double are real CPU tensors, so that DeepSpeed may set `.data`, read data pointers and flatten in C++,
which neither wrapper subclasses nor fake tensors survive; torch's `privateuse1` would need a backend and a process
group in C++. A label belongs to a storage: views and whatever is assigned by `.data` keep it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

HOST = -1
COPIES = {"copy_", "_to_copy", "_copy_from", "_foreach_copy_", "set_data"}
"""Operations that carry data from one device to another."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations on a device tensor whose indices may lie on the host."""
NCCL_TYPES = {
    *(torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


class Refused(RuntimeError):
    """What CUDA or NCCL would have raised, or done wrong."""


class Labels:
    """The device index of every labelled storage; a storage without a label lies on the host."""

    def __init__(self) -> None:
        # A weak reference keeps the storage's address from being used again, so an entry is never another's.
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._lock = threading.Lock()
        self._limit = 4096

    def of(self, tensor: Tensor) -> int:
        """The device index of a tensor, or HOST."""
        known = self._known.get(_address(tensor))
        return known[1] if known else HOST

    def set(self, tensor: Tensor, index: int) -> Tensor:
        """Label the storage of `tensor`; returns it."""
        with self._lock:
            if index == HOST:
                self._known.pop(_address(tensor), None)
            else:
                self._known[_address(tensor)] = (_weak(tensor), index)
            if len(self._known) > self._limit:
                self._known = {k: v for k, v in self._known.items() if not v[0].expired()}
                self._limit = 2 * len(self._known) + 4096
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that the storage is page-locked; returns the tensor."""
        self._pinned[_address(tensor)] = _weak(tensor)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether it was noted."""
        return _address(tensor) in self._pinned

    def check(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        """Raise Refused where a GPU would; returns the label that the results get."""
        name = func._schema.name.split("::")
        tensors = list(tensors_in((args, kwargs)))
        if name[0] == "c10d":
            return self._check_collective(name[1], tensors)
        found = {self.of(tensor) for tensor in tensors}
        if found <= {HOST} or name[1] in COPIES:
            return self.of(tensors[0]) if tensors else HOST
        indices_are_free = name[1] in INDEXED and self.of(args[0]) != HOST
        counted = tensors_in((args[0], args[2:])) if indices_are_free else tensors
        scalars_are_free = torch.Tag.pointwise in func.tags or name[1].startswith("_foreach") or indices_are_free
        written = args[0] if name[1].endswith("_") else None
        places = {
            self.of(tensor)
            for tensor in counted
            if not (scalars_are_free and tensor.dim() == 0 and self.of(tensor) == HOST and tensor is not written)
        }
        if len(places) > 1:
            shapes = ", ".join(f"{_place(self.of(t))}{list(t.shape)}" for t in tensors)
            raise Refused(f"{name[1]}: expected all tensors to be on the same device, found {shapes}")
        return max(found)

    def _check_collective(self, name: str, tensors: list[Tensor]) -> int:
        """NCCL carries contiguous tensors of this rank's device and of some types only."""
        if name in ("barrier", "monitored_barrier_"):
            return HOST
        for tensor in tensors:
            if self.of(tensor) == HOST:
                raise Refused(f"{name}: no backend type associated with device type cpu ({list(tensor.shape)})")
            if not tensor.is_contiguous():
                raise Refused(f"{name}: tensors must be contiguous ({list(tensor.shape)})")
            if tensor.dtype not in NCCL_TYPES:
                raise Refused(f"{name}: input tensor data type is not supported for NCCL: {tensor.dtype}")
        if len({self.of(tensor) for tensor in tensors}) > 1:
            raise Refused(f"{name}: tensors of several devices in one collective")
        return self.of(tensors[0]) if tensors else HOST

    def spread(self, inputs: Iterable[Tensor], results: Any, index: int) -> None:
        """Label the storages that an operation made; views of its inputs have theirs."""
        known = {_address(tensor) for tensor in inputs}
        for tensor in tensors_in(results):
            if _address(tensor) not in known:
                self.set(tensor, index)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, meta tensors left out."""
    if isinstance(values, Tensor):
        with torch._C.DisableTorchFunction():
            if values.device.type == "cpu":
                yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def _place(index: int) -> str:
    return "cpu" if index == HOST else f"cuda:{index}"


def _address(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def _weak(tensor: Tensor) -> StorageWeakRef:
    with torch._C.DisableTorchFunction():
        return StorageWeakRef(tensor.untyped_storage())
