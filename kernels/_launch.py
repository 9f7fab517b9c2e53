"""Launching a kernel: on the device, in Triton's interpreter, or only recorded for offline compilation.

Operators call `launch` and never a jitted function. So the same host code (allocation, grids, arguments) runs on a
GPU, runs on a CPU under `kernels.interpreter`, and yields the exact signatures that `kernels.offline` compiles.

A launch's configuration (tiles, warps, stages) decides the order of its sums and so the last bits of its results. It
is never measured in passing: it is what `use` was given for the launch's key, else what the table of measured
configurations holds, else the first candidate, the one predicted to be best. `kernels.tiles` measures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch.library import wrap_triton

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures with configurations of their own; others use those of the nearest older one."""
MEASURED = Path(__file__).parent / "measured_tiles.json"
"""What was measured on the device that an entry names: {device: {key of a launch: configuration}}."""

Grid = Callable[[dict[str, Any]], tuple[int, ...]]
Configs = Callable[[str, dict[str, Any]], Sequence[triton.Config]]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A jitted function and the configurations that it may run in."""

    fn: Any
    """The `triton.jit` function. An argument UPCAST_DOT, where it has one, is filled in by the launcher."""
    configs: Configs
    """(target, constexprs and ITEMSIZE of the first tensor) -> configurations, the predicted best one first.

    With more than one the kernel must bear repetition, for they are measured in turns: it adds to no output."""
    key: tuple[str, ...] = ()
    """Integer arguments whose powers of two decide, beside dtype and constexprs, which configuration is best."""

    def candidates(self, target: str, args: Sequence[Any], constexprs: dict[str, Any]) -> list[triton.Config]:
        """Configurations for this launch."""
        return list(self.configs(target, {**constexprs, "ITEMSIZE": args[0].element_size()}))

    @functools.cached_property
    def name(self) -> str:
        """Module and function, such as add_layer_norm.forward."""
        return f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__.lstrip('_')}"

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """Where the arguments of `key` stand."""
        return tuple(self.fn.arg_names.index(name) for name in self.key)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch."""

    kernel: Kernel
    grid: Grid
    args: tuple[Any, ...]
    constexprs: dict[str, Any]

    def candidates(self, target: str) -> list[triton.Config]:
        """Configurations that it may run in, the predicted best one first."""
        return self.kernel.candidates(target, self.args, self.constexprs)

    def sizes(self) -> tuple[int, ...]:
        """The arguments of the kernel's key, rounded up to powers of two."""
        return tuple(_power_of_2(self.args[place]) for place in self.kernel.places)

    def key(self, target: str) -> str:
        """What its best configuration depends on, readable; of dropout only whether there is any."""
        given = {name: value for name, value in self.constexprs.items() if name != "UPCAST_DOT"}
        if "THRESHOLD" in given:
            given["DROPOUT"] = given.pop("THRESHOLD") > 0
        given |= zip(self.kernel.key, self.sizes(), strict=True)
        dtype = str(self.args[0].dtype).removeprefix("torch.")
        return " ".join([target, self.kernel.name, dtype, *(f"{name}={value}" for name, value in given.items())])


def _power_of_2(value: int | torch.SymInt) -> int:
    if isinstance(value, torch.SymInt):  # its value would be guarded: a graph for each
        value = value.node.hint or 1
    return 1 << max(value - 1, 0).bit_length()


def describe(config: triton.Config) -> str:
    """A configuration in one line: meta-parameters, warps and stages."""
    blocks = [f"{name}={value}" for name, value in config.kwargs.items()]
    return " ".join([*blocks, f"warps={config.num_warps}", f"stages={config.num_stages}"])


_given: dict[str, str] = {}
_chosen: dict[tuple[Any, ...], triton.Config] = {}


def use(choices: Mapping[str, str]) -> None:
    """From here on launches run in these configurations, {key: configuration}; they replace those given before."""
    global _given
    _given = dict(choices)
    _chosen.clear()


@functools.cache
def _measured() -> dict[str, str]:
    by_device = json.loads(MEASURED.read_text())
    own = device_name()  # what was measured on a device of this name replaces what was on others
    order = sorted(by_device, key=lambda name: name.partition(",")[0] == own)
    return {key: config for name in order for key, config in by_device[name].items()}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def known(key: str) -> str | None:
    """The configuration that this process was given for a key, or else the one in the table of measured ones."""
    return _given.get(key) or _measured().get(key)


def choose(launch: Launch, target: str) -> triton.Config:
    """The configuration of a launch."""
    identity = (id(launch.kernel), target, launch.args[0].dtype, *launch.constexprs.items(), launch.sizes())
    config = _chosen.get(identity)
    if config is None:
        config = _chosen[identity] = _choose(launch, target)
    return config


def _choose(launch: Launch, target: str) -> triton.Config:
    candidates = launch.candidates(target)
    key = launch.key(target)
    wanted = known(key)
    if wanted is None:
        return candidates[0]
    for config in candidates:
        if describe(config) == wanted:
            return config
    warnings.warn(f"{key}: {wanted!a:.99} is no candidate any more; {describe(candidates[0])} is taken.", stacklevel=4)
    return candidates[0]


class Executor:
    """Carries launches out on the device of their first argument."""

    everywhere = False
    """Whether tensors of any device are served."""
    one_by_one = False
    """Whether programs run one after another."""

    def __call__(self, launch: Launch) -> None:
        """Launch in the configuration that is chosen for it."""
        self.run(launch, choose(launch, self.target(launch)))

    def target(self, launch: Launch) -> str:
        """The entry of TARGETS whose configurations it runs in."""
        return target_of(launch.args[0].device)

    def run(self, launch: Launch, config: triton.Config) -> None:
        """Launch in this configuration."""
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        # only what is being traced has to be seen by torch; by that way a launch costs the host twenty times as much
        real = type(launch.args[0]) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        kernel = launch.kernel.fn if real else wrap_triton(launch.kernel.fn)
        kernel[launch.grid](*launch.args, **launch.constexprs, **config.kwargs, **options)


class _Record(Executor):
    """Keeps launches instead of running them."""

    everywhere = True

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)


_executor = Executor()
AnyExecutor = TypeVar("AnyExecutor", bound=Executor)


def executor() -> Executor:
    """What carries launches out now."""
    return _executor


@contextlib.contextmanager
def executing(executor: AnyExecutor) -> Iterator[AnyExecutor]:
    """Let `executor` handle every launch inside the block."""
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
    grid_of = grid if callable(grid) else (lambda _: grid)
    _executor(Launch(kernel=kernel, grid=grid_of, args=args, constexprs=constexprs))


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
    """Streaming multiprocessors of `device`; 1 where programs run one after another; an H100's without a GPU."""
    if _executor.one_by_one:
        return 1
    if not torch.cuda.is_available():
        return 132
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def check(condition: object, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition` holds.

    A message that names sizes is a function: formatting it while a graph is traced would bind the graph to them.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def readable(x: torch.Tensor) -> bool:
    """Whether looking at the values of `x` costs no synchronisation and is possible: not while being compiled."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
