"""Measure which configuration of each kernel is fastest: only where it is asked for, never in the middle of training.

    with measuring() as found:      # each launch with a new key runs in all its candidates, then in the fastest one
        model(batch).backward()
    use(found)                      # from here on, in this process; `found` is plain JSON, to be kept and shared

Kernels with several candidates add to none of their outputs, so that a launch may be repeated. A candidate that does
not compile or needs more than the device has is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from ds_stacking.kernels._launch import (
    Executor,
    Launch,
    describe,
    executing,
    executor,
    known,
    recording,
    target_of,
    use,
)

__all__ = ["Compare", "compare_on_device", "environment", "measuring", "needed", "source_digest", "use"]

Run = Callable[[], None]
Compare = Callable[[Sequence[Run]], list[float]]
"""Runs that take turns -> seconds of each."""
REPEATS = 11
"""Runs of each candidate, of which the median counts."""
SPIN = 1_000_000
"""Cycles that the device spins before a run, half a millisecond: the host has queued the run by then."""


class _Measure(Executor):
    """Carries launches out by another executor, in the fastest configuration."""

    def __init__(self, inner: Executor, compare: Compare, found: dict[str, str]) -> None:
        self.inner, self.compare, self.found = inner, compare, found
        self.everywhere, self.one_by_one = inner.everywhere, inner.one_by_one

    def __call__(self, launch: Launch) -> None:
        target = self.inner.target(launch)
        key, candidates = launch.key(target), launch.candidates(target)
        if len(candidates) == 1 or known(key) is not None:
            self.inner(launch)
            return
        if key not in self.found:
            self.found[key] = describe(self._fastest(launch, candidates))
        self.inner.run(launch, next(config for config in candidates if describe(config) == self.found[key]))

    def _fastest(self, launch: Launch, candidates: list[triton.Config]) -> triton.Config:
        runs = {}
        for config in candidates:
            try:
                self.inner.run(launch, config)
            except TritonError as error:  # it does not compile, or needs more shared memory than there is
                refused = error
            else:
                runs[describe(config)] = functools.partial(self.inner.run, launch, config)
        if not runs:
            raise refused
        seconds = dict(zip(runs, self.compare(list(runs.values())), strict=True))
        return min(
            (config for config in candidates if describe(config) in seconds), key=lambda c: seconds[describe(c)]
        )


@contextlib.contextmanager
def measuring(compare: Compare | None = None, found: dict[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Inside, launches without a known configuration measure theirs; yields {key: configuration}, filled as they come.

    Args:
        compare: what times the candidates; default `compare_on_device`.
        found: what is filled; default a new one.

    Raises:
        TritonError: no candidate of a launch runs.
    """
    found = {} if found is None else found
    with executing(_Measure(executor(), compare or compare_on_device, found)):
        yield found


def compare_on_device(runs: Sequence[Run]) -> list[float]:
    """Median seconds of each run on the current CUDA device; they take turns, none finds its data in L2.

    A kernel that spins lets the host run ahead, so that no launch is waited for.
    """
    size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.zeros(max(size, 1 << 24), dtype=torch.uint8, device="cuda").view(torch.int64)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for run, seconds in zip(runs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.sum()  # reads: written lines would be on their way to memory while the kernel runs
            torch.cuda._sleep(SPIN)
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(seconds) for seconds in times]


def needed(run: Run, device: torch.device) -> dict[str, str]:
    """The launches of `run`, an operator or a model on meta tensors, that nobody has chosen for on `device` yet.

    Returns:
        {key: predicted configuration}.
    """
    target = target_of(device)
    with recording() as launches:
        run()
    found: dict[str, str] = {}
    for launch in launches:
        candidates = launch.candidates(target)
        if len(candidates) > 1 and known(key := launch.key(target)) is None:
            found[key] = describe(candidates[0])
    return found


def environment(device: torch.device) -> str:
    """What measured configurations hold for, such as "NVIDIA H100 80GB HBM3, Triton 3.6.0"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    return f"{name}, Triton {triton.__version__}"


def source_digest() -> str:
    """Digest of the kernels' source, which torch's cache of compiled graphs does not know."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
