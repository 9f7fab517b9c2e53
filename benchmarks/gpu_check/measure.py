"""Timing: interleaved runs, medians, L2 flushed before each; and the machine's own copy and matmul rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Run = Callable[[], object]


@dataclass(kw_only=True)
class Machine:
    """Where the check runs. `dry` is the whole logic on a CPU, with kernels in the interpreter and tiny shapes."""

    dry: bool
    rounds: int
    flush: torch.Tensor
    """Written before each run so that nothing is left in L2."""

    @property
    def device(self) -> str:
        """Device of all tensors."""
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The interpreter multiplies bf16 wrongly."""
        return torch.float32 if self.dry else torch.bfloat16

    def size(self, full: int, tiny: int) -> int:
        """A dimension, tiny in a dry run."""
        return tiny if self.dry else full

    def medians(self, runs: dict[str, Run]) -> dict[str, float]:
        """Median seconds of each run; all of them take turns, so that clocks and heat are the same for all."""
        for run in runs.values():
            for _ in range(1 if self.dry else 3):
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                times[name].append(self._time(run))
        return {name: statistics.median(found) for name, found in times.items()}

    def _time(self, run: Run) -> float:
        self.flush.zero_()
        if self.dry:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass(kw_only=True)
class Rates:
    """What this machine reaches with torch's own copy and matrix product."""

    copy: float
    """Bytes per second, reads and writes counted."""
    matmul: float
    """FLOP per second."""


def machine(dry: bool) -> Machine:
    """The machine at hand."""
    flush = torch.empty(1024 if dry else 256 << 20, dtype=torch.int8, device="cpu" if dry else "cuda")
    return Machine(dry=dry, rounds=2 if dry else 30, flush=flush)


def rates(at: Machine) -> Rates:
    """Copy and matmul rates."""
    n = at.size(8192, 64)
    a, b = (torch.randn(n, n, device=at.device, dtype=at.dtype) for _ in range(2))
    source = torch.empty(at.size(1 << 29, 1 << 12), dtype=torch.int8, device=at.device)
    target = torch.empty_like(source)
    found = at.medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    return Rates(copy=2 * source.numel() / found["copy"], matmul=2 * n**3 / found["matmul"])


@dataclass(kw_only=True)
class Target:
    """What a row has to reach against one peer: peer's time divided by ours, or a share of the copy rate."""

    peer: str
    must: float
    goal: float


@dataclass(kw_only=True)
class Row:
    """One comparison. `limit` is the seconds that this machine's rates allow."""

    case: str
    runs: dict[str, Run]
    bytes: float = 0.0
    flops: float = 0.0
    targets: list[Target] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def result(self, at: Machine, speed: Rates) -> dict[str, object]:
        """Times, ratios and verdicts as JSON values."""
        times = at.medians(self.runs)
        ours = times["ours"]
        limit = max(self.bytes / speed.copy, self.flops / speed.matmul)
        verdicts = []
        for target in self.targets:
            value = self._value(target.peer, times, limit)
            state = "absent" if value is None else "goal" if value >= target.goal else "must"
            if value is not None and value < target.must:
                state = "dry run" if at.dry else "MISSED"
            verdicts.append(
                {"peer": target.peer, "value": value, "must": target.must, "goal": target.goal, "state": state}
            )
        return {
            "case": self.case, "times": times, "share_of_limit": limit / ours if limit else None, "verdicts": verdicts,
            "absent": self.absent,
        }  # fmt: skip

    @staticmethod
    def _value(peer: str, times: dict[str, float], limit: float) -> float | None:
        others = [seconds for name, seconds in times.items() if name != "ours"]
        if peer == "copy":
            return limit / times["ours"]
        if peer == "best":
            return min(others) / times["ours"] if others else None
        return times[peer] / times["ours"] if peer in times else None
