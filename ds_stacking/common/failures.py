"""Failures that may pass: a rank, a device or the network was lost, and the same command may succeed next time."""

from __future__ import annotations

import contextlib
import os
import re

FAILURE_FILE = "DS_STACKING_FAILURE_FILE"
"""Names the file into which ranks write the errors that would come again, for whoever decides about a new start."""
LOST = 71
"""Exit code of a process that failed so (sysexits.h's EX_OSERR): a batch script may start the run again."""

FOLLOWS = {"DistError", "OtherRankFailed"}
"""Exceptions that only say that another rank is gone; torch.distributed, whose one is, may not be imported."""
HARDWARE = re.compile(
    r"CUDA error: .*(ECC|NVLink|hardware|unknown error|busy or unavailable|no CUDA-capable device|not yet initialized"
    r"|initialization error|driver (error|shutting down))",
    re.IGNORECASE,
)
"""What CUDA says of a broken device; an illegal access or a failed assertion would come again."""


def follows_a_loss(error: BaseException) -> bool:
    """Whether `error` tells of a lost rank, device or connection, and nothing of the run itself."""
    if isinstance(error, ImportError | ValueError):  # such as a library of NCCL's that is not installed
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    words = str(error)
    return bool(kinds & FOLLOWS or re.search("gloo|nccl", words, re.IGNORECASE) or HARDWARE.search(words))


def exit_code(error: BaseException) -> int:
    """LOST where the failure may pass, else 1. What another rank met has that rank's code."""
    return LOST if follows_a_loss(error) and type(error).__name__ != "OtherRankFailed" else 1


def note_failure(rank: int, words: str) -> None:
    """Tell the batch script, where there is one, of a failure that would come again."""
    if file := os.environ.get(FAILURE_FILE):
        with contextlib.suppress(OSError), open(file, "a", opener=_no_link) as failures:
            failures.write(f"rank {rank}: {words.partition(chr(10))[0]}\n")


def _no_link(path: str, flags: int) -> int:
    """The file lies beside the run directory, where others may have put a link by its name."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
