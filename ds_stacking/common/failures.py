"""Failures: whether they may pass, and what is said of them.

A rank, a device or the network was lost: the same command may succeed next time. All others would come again. Each is
one sentence; the traceback of what has none of its own goes into a file.
"""

from __future__ import annotations

import os
import re
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.files import whole_file

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
OPTION = "--traceback"
"""Prints tracebacks on standard error too."""
EPILOG = f"{OPTION} prints the full traceback of a failure too, in every launcher."
FULL_DISK = re.compile(r"No space left|Disk quota")
MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|std::bad_alloc|Cannot allocate memory")
"""What torch says, as a RuntimeError, of memory that it did not get."""
_folders: list[Path] = []


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
        with suppress(OSError), open(file, "a", opener=_no_link) as failures:
            failures.write(f"rank {rank}: {words.partition(chr(10))[0]}\n")


def _no_link(path: str, flags: int) -> int:
    """The file lies beside the run directory, where others may have put a link by its name."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def traceback_name(rank: int) -> str:
    """The file of a rank's traceback in a run directory."""
    return f"traceback-rank{rank}.txt"


def take_option(arguments: list[str]) -> bool:
    """Remove `--traceback` from the command line; whether it stood there."""
    given = OPTION in arguments
    arguments[:] = [argument for argument in arguments if argument != OPTION]
    return given


def keep_tracebacks(folder: Path | None) -> None:
    """From now on tracebacks of this process go into `folder`, as long as it is there; None: a temporary one."""
    _folders[:] = [folder] if folder else []


def explain(error: BaseException, rank: int) -> str:
    """The sentence for `error`; what has none of its own is written down with its traceback, whose file it names."""
    return _known(error) or _unknown(error, rank)


def _known(error: BaseException) -> str | None:
    if isinstance(error, UserError | RunFailed):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"} or (isinstance(error, RuntimeError) and MEMORY.search(first)):
        return (
            f"out of memory ({first or type(error).__name__}); lower micro_batch_size or the model's size, take a "
            f"higher ZeRO stage, or more ranks."
        )
    if "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is taken on this node; choose another one, for the "
            f"deepspeed launcher by --master_port."
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        mend = "make room" if FULL_DISK.search(error.strerror) else "mend that"
        return f"{where}{error.strerror}; {mend}, then give the same command again, for a run with --resume auto."
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        return (
            f"the package {package or '(of unknown name)'} is missing or does not fit ({first}); install the project "
            f"again: pip install -e . -c constraints.txt."
        )
    return None


def _unknown(error: BaseException, rank: int) -> str:
    first = str(error).strip().partition("\n")[0]
    words = f"{type(error).__name__}: {first}".rstrip(": .")
    path = _write("".join(traceback.format_exception(error)), rank)
    return f"{words}; the full traceback is in {path}" if path else f"{words}; {OPTION} shows the full traceback."


def _write(text: str, rank: int) -> Path | None:
    """Write a traceback where its user alone reads it; None where nothing can be written."""
    for find in (*(lambda folder=folder: folder for folder in _folders), _temporary):
        with suppress(OSError, UserError):
            folder = find()
            path = folder / traceback_name(rank)
            with whole_file(path, inside=folder) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(text.encode(errors="backslashreplace"))
            return path
    return None


def _temporary() -> Path:
    """A new folder that only this user can enter."""
    return Path(tempfile.mkdtemp(prefix="ds_stacking-"))
