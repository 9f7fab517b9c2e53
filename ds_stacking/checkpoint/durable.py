"""Files and directories that survive a crash: private, written once, fsynced, hashed while they are written.

In a folder that a group shares (its members write there, and new files get that group) they are the group's too, as
far as the umask lets them; everywhere else their owner's alone, whatever the umask.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ds_stacking.checkpoint.format import TEMPORARY

CHUNK = 1 << 22
"""Bytes hashed and written at a time; both release the interpreter lock."""


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    size: int
    sha256: str


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, which nobody beyond the folder's users can read, and force it to the disk. Raises OSError."""
    hasher, size = hashlib.sha256(), 0
    with open(path, "xb", opener=_private) as file:
        for part in parts:
            view = memoryview(part)
            if view.nbytes == 0:
                continue
            view = view.cast("B")
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                hasher.update(chunk)
                file.write(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, hasher.hexdigest())


def file_sha256(path: Path, count: Callable[[int], None] = lambda size: None) -> str:
    """The sha256 of a file's content, as hexadecimal digits; `count` is told the bytes read, again and again."""
    hasher, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            hasher.update(buffer[:size])
            count(size)
    return hasher.hexdigest()


def make_directory(path: Path) -> None:
    """Make a directory that nobody beyond the folder's users can enter, and its parents; an existing one stays."""
    if not path.parent.exists():
        make_directory(path.parent)
    path.mkdir(exist_ok=True, mode=0o770 if _is_shared(path.parent) else 0o700)


def remove_checkpoint(path: Path) -> None:
    """Delete a directory; it loses its name first, so that a crash in between leaves no half of a checkpoint."""
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, *, besides: Path | None = None) -> None:
    """Delete what interrupted saves left in `folder`, all but `besides`; what cannot be deleted stays."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path != besides:
            shutil.rmtree(path, ignore_errors=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o660 if _is_shared(Path(path).parent) else 0o600)


def _is_shared(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)
