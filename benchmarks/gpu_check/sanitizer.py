"""compute-sanitizer over small cases of the kernels, compiled beforehand, in processes with a time limit of their own.

compute-sanitizer --tool memcheck python -m benchmarks.gpu_check.sanitizer
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check import correctness, fp8
from benchmarks.gpu_check.catalogue import Machine, Row, machine
from benchmarks.gpu_check.tiles import differentiate
from benchmarks.gpu_check.worker import BLOCKS
from ds_stacking.kernels.interpreter import interpreted

STAND_IN = ("sh", "-c", 'shift 4; exec "$@"', "stand-in")
"""Takes compute-sanitizer's place in a dry run: leaves its options out and runs the command."""
FAULTS = 9
"""The exit code that compute-sanitizer is told to end with where it found something."""


def rows() -> list[Row]:
    """Out-of-bounds accesses in all kernels, races in shared memory in some: racecheck sees no other memory."""
    names = tuple(row.name for row in small_rows())
    races = names[: correctness.RACES]
    return [
        Row(name="sanitizer memcheck", seconds=60, part="sanitizer", run=_check("memcheck", names)),
        Row(name="sanitizer racecheck", seconds=60, part="sanitizer", run=_check("racecheck", races)),
    ]


def small_rows() -> list[Row]:
    """What it watches."""
    found = [correctness.row(f"watched: {name}", seconds, make) for name, seconds, make in correctness.watched()]
    return found + [row for row in fp8.correctness_rows() if "N=768" in row.name]


def _check(tool: str, cases: tuple[str, ...]) -> Callable[[Machine], dict[str, Any]]:
    def run(at: Machine) -> dict[str, Any]:
        program = (
            STAND_IN if at.dry else (shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer",)
        )
        return sanitize(program, tool, cases, dry=at.dry, limit=240)

    return run


def sanitize(
    program: tuple[str, ...], tool: str, cases: tuple[str, ...], *, dry: bool, limit: float
) -> dict[str, Any]:
    """What `tool` of `program` says of `cases`. Raises RuntimeError where it could not look."""
    if shutil.which(program[0]) is None:
        return {"skipped": "compute-sanitizer is absent"}
    watched = [sys.executable, "-m", "benchmarks.gpu_check.sanitizer"]
    command = [*program, "--tool", tool, "--error-exitcode", str(FAULTS), *watched]
    command += ["--dry"] * dry
    # torch's allocator hands out parts of large blocks, whose ends the tool does not know
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, *cases], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
    )
    if done.returncode == FAULTS:
        return {"ok": False, "found": done.stdout[-2000:]}
    if done.returncode:
        raise RuntimeError(f"{tool} ended with {done.returncode}: {done.stdout[-1000:]}")
    return {"ok": True, "cases": len(cases)}


def main(arguments: list[str] | None = None) -> int:
    """Run small cases forward and backward; whether they are right is checked elsewhere."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args(arguments)
    at = machine(dry=options.dry, small=True)
    with interpreted(**BLOCKS) if at.dry else contextlib.nullcontext():
        known = {row.name: row.ours for row in small_rows()}
        for name in options.cases:
            ours = known[name]
            assert ours is not None
            if "fp8" not in name or not fp8.refusal(at):
                differentiate(ours(at))
    return 0


if __name__ == "__main__":
    sys.exit(main())
