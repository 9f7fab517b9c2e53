"""Standard output and error that a program outlives: closed ones, readers that are gone, pipes that are full."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
from typing import TextIO

STANDARD = (0, 1, 2)
"""Descriptors of standard input, output and error."""
PATIENCE = 3.0
"""Seconds that the words may take."""


def keep_streams() -> None:
    """Let no word that cannot be said end the program, nor be written into a file that it has open.

    A stream that was closed (`>&-`) would leave its number to the next file that is opened, and what libraries print
    would be written there.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (for as long as the process lives)
    sys.stdout, sys.stderr = _kept(sys.stdout, sys.__stdout__, 1), _kept(sys.stderr, sys.__stderr__, 2)


class _Outlived(io.FileIO):
    """A descriptor; what nobody takes any more is dropped."""

    def write(self, data: object) -> int:  # type: ignore[override]
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return memoryview(data).nbytes  # type: ignore[arg-type]


def _kept(stream: TextIO | None, original: TextIO | None, number: int) -> TextIO:
    if stream is not None and (stream is not original or isinstance(getattr(stream.buffer, "raw", None), _Outlived)):
        return stream  # somebody else's, such as a test's
    if stream is not None:
        stream.flush()
    kept = io.TextIOWrapper(
        io.BufferedWriter(_Outlived(number, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
    )
    setattr(sys, f"__std{'out' if number == 1 else 'err'}__", kept)
    return kept


def last_words(text: str, *, stacks: bool = False) -> None:
    """Print `text` on standard error, with `stacks` where every thread stands too, in `PATIENCE` seconds at most."""

    def speak() -> None:
        print(text, file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback(all_threads=True)

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(PATIENCE)
