"""What the figures belong to and what the machine itself reaches; torch.compile of our operators."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

import torch
import triton

from benchmarks.gpu_check import speed
from benchmarks.gpu_check.catalogue import Machine, Row
from benchmarks.gpu_check.peers import compiled
from ds_stacking.kernels import add_layer_norm, attention_padded, bias_gelu, linear_cross_entropy

PACKAGES = ("transformers", "deepspeed", "liger-kernel", "cut-cross-entropy", "nvidia-ml-py", "zstandard", "pydantic")
COMPILATION_SECONDS = 220.0
"""After which the rest is left to the JIT; less than the row's own limit, so that its end is an answer."""
DRY = "CPU, dry run"
"""The device of a dry run, whose times mean nothing."""
PRODUCTS = [(n, k) for d in (768, 1024) for n, k in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))]
"""(columns, depth) of a block's matrix products."""


def first() -> list[Row]:
    """What all other rows are read by."""
    return [
        Row(name="environment", seconds=2, part="facts", run=environment, always=True, vital=True),
        Row(name="compilation", seconds=60, part="facts", run=compilation, always=True),
        Row(name="rates", seconds=6, part="facts", run=rates, always=True),
    ]


def last() -> list[Row]:
    """Less than the kernels' own figures, more than the sanitizer."""
    return [
        Row(name="compiled", seconds=25, part="facts", run=check_compiled),
    ]


def environment(at: Machine) -> dict[str, Any]:
    """Device, software and commit."""
    found: dict[str, Any] = {
        "date": time.strftime("%F %H:%M", time.gmtime()), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "commit": _commit(),
        "cores": len(os.sched_getaffinity(0)), "packages": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip
    if at.dry:
        return {"device": DRY, **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "capability": torch.cuda.get_device_capability(), "bytes": properties.total_memory,
        "l2": properties.L2_cache_size, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **found,
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def compilation(at: Machine) -> dict[str, Any]:
    """Compile what the rows to come will launch, on all cores; the JIT finds it on the disk."""
    if not at.dry and torch.cuda.get_device_capability() != (9, 0):
        return {"skipped": "kernels are compiled beforehand for compute capability 9.0 only"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check.precompile", *(["--dry"] * at.dry)], input="\n".join(at.pending),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=COMPILATION_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compilation ended with {done.returncode}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rates(at: Machine) -> dict[str, Any]:
    """Bytes per second of a copy (reads and writes counted) and of reading, FLOP per second of matrix products."""
    assert at.timer is not None
    n, tokens = at.size(8192, 64), at.size(speed.TOKENS, 64)
    source = torch.empty(at.size(1 << 28, 1 << 12), dtype=torch.float32, device=at.device).fill_(1.0)
    target, total = torch.empty_like(source), torch.empty((), device=at.device)
    a, b = (torch.randn(n, n, device=at.device, dtype=at.dtype) for _ in range(2))
    runs = {
        "copy": lambda: target.copy_(source),
        "read": lambda: torch.sum(source, dim=0, out=total),
        "matmul": lambda: a @ b,
    }
    work = {"copy": 2.0 * source.numel() * 4, "read": 4.0 * source.numel(), "matmul": 2.0 * n**3}
    for columns, depth in PRODUCTS[: 2 if at.dry else None]:
        x, w = (torch.randn(rows, depth, device=at.device, dtype=at.dtype) for rows in (tokens, columns))
        name = f"matmul {tokens} x {depth} x {columns}"
        runs[name], work[name] = (lambda x=x, w=w: x @ w.mT), 2.0 * tokens * depth * columns
    found = at.timer.compare(runs)
    return {"rates": {name: work[name] / found["times"][name][1] for name in runs}, "clocks": found["clocks"]}


def check_compiled(at: Machine) -> dict[str, Any]:
    """opcheck of an operator and `torch.compile(fullgraph=True)` of a chain of them, gradients included."""

    def chain(x, vector):
        y = add_layer_norm(bias_gelu(x, vector), vector, vector, residual=x)
        return attention_padded(torch.cat([y, y, y], 1).view(2, -1, 3, 1, y.shape[1]).contiguous()).sum()

    x, vector = (torch.randn(size, device=at.device, dtype=at.dtype) for size in ((32, 64), (64,)))
    x.requires_grad_()
    torch.library.opcheck(torch.ops.ds_stacking.bias_gelu.default, (x.detach(), vector, False))
    want = torch.autograd.grad(chain(x, vector), x)[0]
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(chain, fullgraph=True, backend=_backend(at))(x, vector), x)[0]
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    h, weight = (torch.randn(n, 64, device=at.device, dtype=at.dtype, requires_grad=True) for n in (16, 80))
    bias, target = torch.zeros(80, device=at.device, dtype=at.dtype), torch.arange(16, device=at.device)
    loss = compiled(linear_cross_entropy, at)
    eager, ours = (torch.autograd.grad(f(h, weight, bias, target), (h, weight)) for f in (linear_cross_entropy, loss))
    torch.testing.assert_close(ours, eager, atol=2e-2, rtol=2e-2)
    return {"ok": True}


def _backend(at: Machine) -> str:
    return "aot_eager" if at.dry else "inductor"
