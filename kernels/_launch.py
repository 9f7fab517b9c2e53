"""Launching a kernel: on the device, in Triton's interpreter, or only recorded for offline compilation.

Operators call `launch` and never a jitted function. So the same host code (allocation, grids, arguments) runs on a
GPU, runs on a CPU under `kernels.interpreter`, and yields the exact signatures that `kernels.offline` compiles.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch.library import wrap_triton

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures with configurations of their own; others use those of the nearest older one."""

Grid = Callable[[dict[str, Any]], tuple[int, ...]]
Configs = Callable[[str, dict[str, Any]], Sequence[triton.Config]]


@dataclass(kw_only=True)
class Kernel:
    """A jitted function and the configurations that autotune may pick for it."""

    fn: Any
    """The `triton.jit` function. An argument UPCAST_DOT, where it has one, is filled in by the launcher."""
    configs: Configs
    """(target, constexprs and ITEMSIZE of the first tensor) -> configurations, the most likely best one first."""
    key: tuple[str, ...] = ()
    """Arguments whose change tunes anew."""
    tuned: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Tuners already made, by their configurations."""

    def candidates(self, target: str, args: Sequence[Any], constexprs: dict[str, Any]) -> list[triton.Config]:
        """Configurations for this launch."""
        return list(self.configs(target, {**constexprs, "ITEMSIZE": args[0].element_size()}))

    def tuner(self, candidates: list[triton.Config]) -> Any:
        """The autotuner over `candidates`, made once; it does not measure when there is only one."""
        name = tuple(str(config) for config in candidates)
        if name not in self.tuned:
            self.tuned[name] = triton.autotune(configs=candidates, key=list(self.key))(self.fn)
        return self.tuned[name]


@dataclass(kw_only=True)
class Launch:
    """One recorded launch."""

    kernel: Kernel
    args: tuple[Any, ...]
    constexprs: dict[str, Any]


class _Run:
    """Launches on the device of the first argument."""

    everywhere = False

    def __call__(self, kernel: Kernel, grid: Grid, args: tuple[Any, ...], constexprs: dict[str, Any]) -> None:
        tuner = kernel.tuner(kernel.candidates(target_of(args[0].device), args, constexprs))
        wrap_triton(tuner)[grid](*args, **constexprs)


class _Record:
    """Keeps launches instead of running them."""

    everywhere = True

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Kernel, grid: Grid, args: tuple[Any, ...], constexprs: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel=kernel, args=args, constexprs=constexprs))


_executor: Any = _Run()


@contextlib.contextmanager
def executing(executor: Any) -> Iterator[Any]:
    """Let `executor` handle every launch inside the block, on tensors of any device."""
    global _executor
    previous, _executor = _executor, executor
    try:
        yield executor
    finally:
        _executor = previous


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of the operators called inside, on meta tensors, without running them."""
    with executing(_Record()) as record:
        yield record.launches


def launch(kernel: Kernel, grid: Grid | tuple[int, ...], *args: Any, **constexprs: Any) -> None:
    """Launch `kernel`; block sizes come from its configurations unless they are among `constexprs`."""
    if "UPCAST_DOT" in kernel.fn.arg_names:
        constexprs["UPCAST_DOT"] = False
    # a grid without programs is an error on the device; empty tensors need no work
    if not callable(grid) and 0 in grid:
        return
    _executor(kernel, grid if callable(grid) else (lambda _: grid), args, constexprs)


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether operators on `x` launch kernels rather than compute their PyTorch reference."""
    return _executor.everywhere or (x.is_cuda and target_of(x.device) != "")


def target_of(device: torch.device) -> str:
    """The entry of TARGETS whose configurations serve `device`; "" where no kernel is supported."""
    if not torch.cuda.is_available():  # fake tensors on a machine without a GPU
        return "sm_90"
    return _target(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _target(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    # consumer parts (12.x) have little shared memory; the sm_80 configurations fit them
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_80"}.get(major, "")


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 1 in the interpreter, where programs run one after another."""
    if _executor.everywhere:
        return 1
    if not torch.cuda.is_available():
        return 132
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def check(condition: object, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def readable(x: torch.Tensor) -> bool:
    """Whether looking at the values of `x` costs no synchronisation and is possible: not while being compiled."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
