"""python -m benchmarks.gpu_check [--dry] [--minutes 8] [--only PATTERN ...] [--resume [FOLDER]] [--session] [--list]

Every kernel's correctness and speed beside its peers, on one GPU; with `--session` also training steps, growth, resume
and a comparison. Rows run in order of worth in processes of their own; each result is a line of `gpu_check.jsonl`
(`session.jsonl`) in the folder $OUT, default benchmarks/results/gpu, on the disk before the next row begins. `--resume`
runs only what has no result yet (what failed, once more), in $OUT or as told by the results in FOLDER. `--dry` runs all
of it on a CPU with tiny shapes and the kernels in Triton's interpreter: it proves the logic, its times mean nothing.

The exit code is 1 where a kernel is wrong or a row has an error, in a dry run also where one is missing; missed targets
are reported, no error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.gpu_check.catalogue import PARTS, Row, rows
from benchmarks.gpu_check.journal import Journal
from benchmarks.gpu_check.parent import Check, worker_command
from benchmarks.gpu_check.report import errors, table, wrong


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    chosen = choose(rows(), PARTS if options.session else PARTS[:4], options.only)
    if options.list:
        print("\n".join(f"{row.seconds:6.1f} s  {row.name}" for row in chosen))
        return 0
    if not chosen:
        print(f"No row matches {' '.join(options.only)}; --list shows all.")
        return 2
    if not options.dry and not _has_gpu():
        print("No GPU is visible to torch; use --dry to run the logic on a CPU.")
        return 2
    out = Path(os.environ.get("OUT", "benchmarks/results/gpu"))
    return run(chosen, out, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dry", action="store_true", help="on a CPU, in the interpreter")
    add("--minutes", type=float, default=8.0, help="start no row that does not fit into this time")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="rows whose name contains or matches one of these")
    add("--resume", nargs="?", const="", metavar="FOLDER", help="only rows without a result in $OUT, or in FOLDER")
    add("--session", action="store_true", help="training too")
    add("--list", action="store_true", help="name the rows with their estimates, run none")
    return parser.parse_args(arguments)


def choose(known: Sequence[Row], parts: Sequence[str], patterns: Sequence[str]) -> list[Row]:
    """The rows of `parts` that match; with patterns those that say what the machine is go along."""
    found = [row for row in known if row.part in parts]
    matches = [row for row in found if not patterns or any(p in row.name or fnmatch(row.name, p) for p in patterns)]
    return [row for row in found if row in matches or (row.always and matches)]


def run(chosen: Sequence[Row], out: Path, options: argparse.Namespace) -> int:
    """Run what is to be run, print the table."""
    name = "session" if options.session else "gpu_check"
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / f"{name}.jsonl")
    journal.begin(None if options.resume is None else Path(options.resume or out))
    settled = journal.settled()
    todo = [row for row in chosen if row.name not in settled]
    todo = [row for row in chosen if row.always or row in todo] if todo else []
    check = Check(
        journal=journal, command=worker_command(options.dry), log=out / f"{name}.log",
        deadline=time.monotonic() + 60 * options.minutes, show=lambda text: print(text, flush=True),
    )  # fmt: skip
    check.run(todo)
    records = journal.latest()
    print(table(records, check.left_out))
    missing = [row.name for row in chosen if row.name not in records]
    if options.dry and missing:
        print(f"missing: {', '.join(missing)}")
    return 1 if wrong(records) or errors(records) or (options.dry and missing) else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
