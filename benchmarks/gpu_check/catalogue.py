"""What rows are, and which there are, in order of worth: the first ones are run where time is short."""

from __future__ import annotations

import gc
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_check.measure import Cuda, Host, Timer

Function = Callable[..., Any]
Ours = tuple[Function, list[torch.Tensor]]
"""One of our operators as a function of the tensors that get gradients, and these tensors."""


def present(module: str) -> bool:
    """Whether a module can be imported; a package of which half is there counts as absent."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


@dataclass(kw_only=True)
class Machine:
    """Where rows run: a GPU, a CPU (`dry`: tiny shapes, kernels in the interpreter), or meta tensors (no timer)."""

    device: str
    dtype: torch.dtype
    dry: bool = False
    small: bool = False
    """Small shapes on a GPU, for compute-sanitizer."""
    timer: Timer | None = None
    tiles: dict[str, str] = field(default_factory=dict)
    """Configurations of kernels that were measured in this process, by their keys."""
    without: frozenset[str] = frozenset()
    """Peers that killed an earlier attempt at this row."""
    pending: tuple[str, ...] = ()
    """Rows that will follow."""
    left: float = 0.0
    """Seconds until the check ends, when this row began."""
    tell: Callable[[str], None] = lambda text: None
    """Reaches the parent."""
    doing: str = ""
    """What was last said."""

    def size(self, full: int, tiny: int) -> int:
        """A dimension, tiny in a dry run and under the sanitizer."""
        return tiny if self.dry or self.small else full

    def random(self, *shape: int) -> torch.Tensor:
        """A leaf that gets a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()

    def seed(self) -> torch.Tensor:
        """The seed of a dropout mask."""
        return torch.full((1,), 20_19, dtype=torch.int64, device=self.device)

    def say(self, doing: str) -> None:
        """Tell the parent what runs now, so that it knows what hung or crashed."""
        self.doing = doing
        self.tell(doing)

    def free(self) -> None:
        """Give back what a row has left."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def healthy(self) -> bool:
        """Whether the device still answers: after some errors a CUDA context is of no use."""
        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception:
            return False
        return True


@dataclass(kw_only=True)
class Row:
    """One thing to find out, worth a line of the journal."""

    name: str
    run: Callable[[Machine], dict[str, Any]]
    seconds: float
    """What it takes on one H100 with all kernels compiled, more or less."""
    part: str
    """Rows of one part share a process."""
    ours: Callable[[Machine], Ours] | None = None
    """Where it runs kernels of ours: what to call, for their compilation beforehand."""
    choose_tiles: bool = False
    """Whether the fastest configurations of its kernels are measured first."""
    interpret: bool = True
    """Whether these run in the interpreter in a dry run; a whole model is too slow for it and runs references."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    vital: bool = False
    """Without its result no other row is of use."""
    takes_the_rest: bool = False
    """It goes on until the time is up, and `seconds` are the least that it needs."""
    always: bool = False
    """What it finds out holds for one machine and start, so that a resumed check runs it again."""

    @property
    def limit(self) -> float:
        """Seconds after which it counts as hung."""
        return 60 + 3 * self.seconds

    def reseed(self) -> None:
        """The same inputs whenever and wherever this row runs."""
        torch.manual_seed(zlib.crc32(self.name.encode()))


def machine(*, dry: bool, small: bool = False) -> Machine:
    """The machine at hand. The interpreter multiplies bf16 wrongly, so a dry run is in fp32."""
    if dry:
        return Machine(device="cpu", dtype=torch.float32, dry=True, timer=Timer(device=Host(), rounds=2, warm_up=1))
    timer = None if small else Timer(device=Cuda(), rounds=30)
    return Machine(device="cuda", dtype=torch.bfloat16, small=small, timer=timer)


def on_meta(*, dry: bool, small: bool = False) -> Machine:
    """Shapes alone, as on `machine`, to record launches with."""
    return Machine(device="meta", dtype=torch.float32 if dry else torch.bfloat16, dry=dry, small=small)


PARTS = ("facts", "correctness", "kernels", "sanitizer", "model", "growth", "resume", "comparison")
"""In order of worth. The first four are the kernels' check, all of them a session."""


def rows() -> list[Row]:
    """All rows, in order of worth."""
    from benchmarks.gpu_check import correctness, facts, fp8, model, sanitizer, speed, training

    found = [
        *facts.first(),
        *correctness.rows(),
        *fp8.correctness_rows(),
        *speed.rows(),
        *fp8.speed_rows(),
        *facts.last(),
        *sanitizer.rows(),
        *model.rows(),
        *training.rows(),
    ]
    names = [row.name for row in found]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    return found
