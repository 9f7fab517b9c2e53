"""Compile the kernels of rows beforehand, on all cores and without a GPU, where the JIT will find them on the disk.

Rows call our operators on meta tensors with their launches recorded. Every launch is then given to Triton's own JIT in
every configuration that may be picked, as a warm-up under a driver that only names the target: so that the key in
Triton's cache is made by the code that will ask for it.

    python -m benchmarks.gpu_check.precompile < names     # one row's name on each line; prints what was done as JSON
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.gpu_check.catalogue import Machine, Row, on_meta, rows
from benchmarks.gpu_check.tiles import differentiate
from ds_stacking.kernels._launch import Launch, recording

TARGET = "sm_90"
MULTIPROCESSORS = 132
"""Of an H100 and an H200; by their number attention chooses between its kernels."""
ATTENTION = importlib.import_module("ds_stacking.kernels.attention")
"""The module; the package's attribute of this name is the function."""


class StandIn:
    """What the JIT asks a driver while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32)


def launches(row: Row, at: Machine) -> list[Launch]:
    """What the row's operator launches, forward and backward; `at` is on meta tensors."""
    assert row.ours is not None
    # while launches are recorded there is one multiprocessor, as in the interpreter
    with recording() as found, mock.patch.object(ATTENTION, "multiprocessors", lambda device: MULTIPROCESSORS):
        differentiate(row.ours(at))
    return found


def tasks(wanted: Iterable[Row], at: Machine) -> tuple[list[tuple[Launch, Any]], list[str]]:
    """(launch, configuration) of all compilations, the same one once; and why rows could not be recorded."""
    found: dict[str, tuple[Launch, Any]] = {}
    failed = []
    for row in wanted:
        try:
            recorded = launches(row, at)
        except Exception as error:  # the row itself will say so again
            failed.append(f"{row.name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        for launch in recorded:
            for config in launch.candidates(TARGET):
                found.setdefault(_name(launch, config), (launch, config))
    return list(found.values()), failed


def _name(launch: Launch, config: Any) -> str:
    values = [str(x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in launch.args]
    return f"{launch.kernel.fn.fn.__module__} {launch.kernel.fn.__name__} {values} {launch.constexprs} {config}"


def warm_up(launch: Launch, config: Any) -> None:
    """Compile one launch in one configuration; the file lands in Triton's cache."""
    driver.set_active(StandIn())  # type: ignore[no-untyped-call]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch.kernel.fn.warmup(*launch.args, grid=(1,), **launch.constexprs, **config.kwargs, **options)


_todo: list[tuple[Launch, Any]] = []


def _nth(index: int) -> str:
    """The error of one compilation, empty where it went well."""
    try:
        warm_up(*_todo[index])
    except Exception as error:
        return f"{_todo[index][0].kernel.fn.__name__} {_todo[index][1]}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_all(todo: list[tuple[Launch, Any]], processes: int) -> list[str]:
    """Compile in so many processes; what failed. A process that dies costs the compilations not yet done."""
    global _todo
    _todo = todo
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        return [text for text in pool.map(_nth, range(len(todo))) if text]


def processes() -> int:
    """One per core that this process may use, of which a host may have more; at most 32, as each takes memory."""
    return min(32, len(os.sched_getaffinity(0)))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; failures are named in what is printed, since the JIT will meet them again in their rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true", help="tiny shapes, the first three compilations only")
    parser.add_argument("--processes", type=int, default=processes())
    options = parser.parse_args(arguments)
    names = {line.strip() for line in sys.stdin}
    begin = time.monotonic()
    wanted = [row for row in rows() if row.name in names]
    todo, unrecorded = tasks([row for row in wanted if row.ours is not None], on_meta(dry=options.dry))
    if any(row.part == "sanitizer" for row in wanted):
        from benchmarks.gpu_check.sanitizer import small_rows

        more, unrecorded_too = tasks(small_rows(), on_meta(dry=options.dry, small=True))
        todo, unrecorded = todo + more, unrecorded + unrecorded_too
    recorded = time.monotonic()
    todo = todo[:3] if options.dry else todo
    failed = compile_all(todo, options.processes)
    done = {
        "compilations": len(todo), "failed": unrecorded + failed, "seconds_to_record": round(recorded - begin, 1),
        "seconds_to_compile": round(time.monotonic() - recorded, 1),
    }  # fmt: skip
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
