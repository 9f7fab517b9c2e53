"""Device time: events behind a spin kernel that lets the host run ahead, L2 flushed by reading, runs interleaved.

A run's seconds lie between two events on the stream. Before the first one a kernel spins for longer than the host
needs to queue the run, so that no launch waits for the host; before that a buffer larger than L2 is read, so that
nothing of the run's tensors is cached and no written line waits for its write-back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.gpu_check.telemetry import Reading, telemetry

Run = Callable[[], object]
SPIN = 1e-3
"""Seconds that the device spins at least before a run."""
FALL = 0.97
"""A row whose clock is below this share of the worker's first is measured once more."""


class Event(Protocol):
    """What of torch.cuda.Event is used."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Cuda:
    """The GPU at hand."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self._buffer = torch.ones(64 << 20, device="cuda")  # 256 MB, five times an H100's L2
        self._sum = torch.empty((), device="cuda")
        self.clocks: Callable[[], Reading] = telemetry(str(getattr(properties, "uuid", "")))
        self._rate = self._cycles_per_second()

    def _cycles_per_second(self, cycles: int = 20_000_000) -> float:
        begin, end = self.event(), self.event()
        torch.cuda._sleep(cycles)
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (begin.elapsed_time(end) / 1e3)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def flush(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)

    def spin(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._rate))

    def wait(self) -> None:
        torch.cuda.synchronize()


class Host:
    """A CPU in its place, for a dry run."""

    clocks = staticmethod(telemetry("none on this machine"))

    class Event:
        seconds = 0.0

        def record(self) -> None:
            self.seconds = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.seconds - self.seconds)

    def event(self) -> Event:
        return Host.Event()

    def flush(self) -> None: ...

    def spin(self, seconds: float) -> None: ...

    def wait(self) -> None: ...


@dataclass(kw_only=True)
class Timer:
    """Times runs on `device`, a Cuda, a Host or a stand-in of a test."""

    device: Any
    rounds: int
    warm_up: int = 3
    first: Any = field(default=None, init=False)
    """SM clock in MHz when this worker began; None where it cannot be read."""

    def compare(self, runs: Mapping[str, Run]) -> dict[str, Any]:
        """Times of all runs, which take turns, and clocks; once more where the clock has fallen since the start."""
        if self.first is None:
            self.first = self.clocks().get("sm_mhz")
        found = self._once(runs)
        if self._fell(found["clocks"]):
            found = {**self._once(runs), "repeated_after": found["clocks"]}
            found["clock_fell"] = self._fell(found["clocks"])
        return found

    def clocks(self) -> Reading:
        """What the GPU reads under load: an idle one lowers its clocks."""
        self.device.spin(50 * SPIN)
        reading = self.device.clocks()
        self.device.wait()
        return reading

    def _fell(self, clocks: list[Reading]) -> bool:
        found = [float(reading["sm_mhz"]) for reading in clocks if "sm_mhz" in reading]
        return bool(self.first and found and min(found) < FALL * self.first)

    def _once(self, runs: Mapping[str, Run]) -> dict[str, Any]:
        host = {name: self._host_seconds(run) for name, run in runs.items()}
        before = self.clocks()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                times[name].append(self.sample(run, max(SPIN, 2 * host[name])))
        return {
            "times": {name: _quartiles(found) for name, found in times.items()},
            "host": host,
            "clocks": [before, self.clocks()],
        }

    def _host_seconds(self, run: Run) -> float:
        """How long the host needs to queue `run`, after a warm-up."""
        for _ in range(self.warm_up):
            run()
        self.device.wait()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self.device.wait()
        return seconds

    def sample(self, run: Run, spin: float = SPIN) -> float:
        """Device seconds of one run."""
        begin, end = self.device.event(), self.device.event()
        self.device.flush()
        self.device.spin(spin)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _quartiles(seconds: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(seconds) < 2:
        return seconds * 3
    return statistics.quantiles(seconds, n=4, method="inclusive")
