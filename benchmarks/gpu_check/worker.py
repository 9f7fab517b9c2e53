"""The process that runs rows: one name per line of standard input, one JSON line per answer.

What else a row prints goes to standard error. After an error that leaves the CUDA context unusable the answer says
`lost`, and the process ends; the parent starts another for the rows that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check.catalogue import Machine, Row, machine, rows

BLOCKS = {"ROWS": 64, "BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_P": 8, "BLOCK_T": 8, "STAGES": 1}
"""Tiles in the interpreter: each step of a kernel costs the same there, however much it computes."""


def perform(row: Row, at: Machine) -> dict[str, Any]:
    """The row's result, or its error as text, and how long it took."""
    begin = time.monotonic()
    try:
        row.reseed()
        with _kernels(row, at):
            result = row.run(at)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error)[:500]}", "lost": not at.healthy(), "at": at.doing}
    return {"row": row.name, **result, "seconds": round(time.monotonic() - begin, 2)}


def _kernels(row: Row, at: Machine) -> contextlib.AbstractContextManager[Any]:
    """Around a row that runs kernels: in a dry run the interpreter. Choices of tiles would be entered here too."""
    if not (at.dry and row.ours and row.interpret):
        return contextlib.nullcontext()
    from ds_stacking.kernels.interpreter import interpreted

    return interpreted(**BLOCKS)


def serve(known: dict[str, Row], make: Callable[[], Machine], say: Callable[[dict[str, Any]], None]) -> int:
    """Answer requests until there are no more, or the device is lost."""
    at: Machine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            at = at or make()
        except Exception as error:
            say({"row": request["row"], "error": f"no device: {type(error).__name__}: {error}", "lost": True})
            return 1
        at.without, at.pending = frozenset(request["without"]), tuple(request["pending"])
        at.tell, at.doing = lambda text: say({"doing": text}), ""
        answer = perform(known[request["row"]], at)
        say(answer)
        if answer.get("lost"):
            return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where the device was lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints there

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return serve({row.name: row for row in rows()}, lambda: machine(dry=options.dry), say)


if __name__ == "__main__":
    sys.exit(main())
