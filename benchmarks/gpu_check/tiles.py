"""Configurations of kernels in the check: measured before a row is timed, all of them tried where a row is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks.gpu_check.catalogue import Machine, Ours
from ds_stacking.kernels._launch import Executor, Launch, executing, executor, use
from ds_stacking.kernels.tiles import measuring

DRY_CONFIGURATIONS = 2
"""Of a kernel in a dry run: the interpreter is slow, and gives all the same tiles."""


def differentiate(ours: Ours) -> list[Tensor]:
    """Forward once and, of what has gradients, backward; the outputs."""
    function, inputs = ours
    out = function(*inputs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    differentiable = [x for x in outputs if x.requires_grad]
    if differentiable:
        torch.autograd.grad(differentiable, inputs, [torch.ones_like(x) for x in differentiable])
    return outputs


def choose(at: Machine, ours: Ours) -> dict[str, str]:
    """Measure the configurations of what `ours` launches and use the fastest from here on; {key: configuration}."""
    with measuring(_in_their_order if at.dry else None) as found:
        differentiate(ours)
    at.tiles |= found
    use(at.tiles)
    return dict(found)


def _in_their_order(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds of candidates in a dry run."""
    return [float(index) for index in range(len(runs))]


class Nth(Executor):
    """Launches every kernel in its candidate number n, or in its last one."""

    def __init__(self, inner: Executor, n: int) -> None:
        self.inner, self.n = inner, n
        self.everywhere, self.one_by_one = inner.everywhere, inner.one_by_one
        self.most = 0
        """Candidates of the kernel that has most."""

    def __call__(self, launch: Launch) -> None:
        candidates = launch.candidates(self.inner.target(launch))
        self.most = max(self.most, len(candidates))
        self.inner.run(launch, candidates[min(self.n, len(candidates) - 1)])


def in_all_configurations(compute: Callable[[], list[Tensor]], dry: bool) -> list[list[Tensor]]:
    """What `compute` returns with every kernel in its first candidate, in its second, ...

    One that does not fit the device is left out, as it is when tiles are measured; the first has to.
    """
    found: list[list[Tensor]] = []
    n, most = 0, 1
    while n < most:
        with executing(Nth(executor(), n)) as nth:
            try:
                found.append(compute())
            except TritonError:
                if n == 0:
                    raise
        most = min(nth.most, DRY_CONFIGURATIONS) if dry else nth.most
        n += 1
    return found
