"""Files and folders that are whole or absent: made under another name, forced to the disk, renamed.

A process may be killed, a disk may be full and a machine may lose its power between any two lines: under a name then
stands what stood there before, or all of the new content. Permissions are those that the umask leaves. What a killed
writer left of a file is known by its name (`is_leftover`); it may be deleted by whoever knows that nobody else writes
in the folder. Whoever fills a folder holds a lock on it; what a killed process left has none, and goes when a folder
of the same name is made again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ds_stacking.common.errors import RunFailed
from ds_stacking.common.own_files import open_folder

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a write says where there is no room for it."""


@contextmanager
def whole_file(path: Path, *, inside: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write to, which gets the name `path` when the `with` ends, and is gone where that raises.

    Below `inside`, a folder above the file, no link is followed; without it, the user has named the file.
    """
    temporary = _unfinished(path.name)
    folders = path.parent.relative_to(inside).parts if inside else ()
    with open_folder(inside or path.parent, *folders) as parent:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=parent)
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
            raise
        os.fsync(parent)


def write_text(path: Path, text: str, *, inside: Path | None = None) -> None:
    """Write a text file as UTF-8, whole or not at all; links below `inside` are not followed."""
    with whole_file(path, inside=inside) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any, *, inside: Path | None = None) -> None:
    """Write a JSON file, whole or not at all; a number that is not finite becomes null. Raises TypeError."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n", inside=inside)


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_leftover(path: Path) -> bool:
    """Whether `path` has the name of a file that was never finished."""
    return _LEFTOVER.fullmatch(path.name) is not None


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(folder: Path, *, inside: Path | None = None, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill, which has the name `folder` when the `with` ends, and is gone where that raises.

    An empty folder that stands there is replaced, any other, or a link, with `replace` only. Below `inside`, a folder
    above it, no link is followed. Raises OSError.
    """
    folders = folder.parent.relative_to(inside).parts if inside else ()
    with open_folder(inside or folder.parent, *folders) as parent:
        _sweep(folder.name, parent)
        temporary = _unfinished(folder.name)
        os.mkdir(temporary, dir_fd=parent)
        try:
            with _locked(temporary, parent):
                yield folder.with_name(temporary)
                _sync(folder.with_name(temporary))
                _rename(temporary, folder.name, parent, replace=replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True, dir_fd=parent)
            raise
        os.fsync(parent)


def explain_disk(what: str, where: Path, error: OSError) -> RunFailed:
    """The sentence for a folder that could not be written."""
    words = error.strerror or str(error)
    mend = "free space on its disk" if error.errno in FULL else "mend that"
    return RunFailed(f"{what} could not be written to {where}: {words}; {mend} and run the same command again.")


def _unfinished(name: str) -> str:
    # not the process's number: two hosts may have the same one
    return f".{name}.{secrets.token_hex(8)}.tmp"


def _rename(temporary: str, name: str, parent: int, *, replace: bool) -> None:
    aside = None
    if replace:
        # under another name first: deleted under its own, a kill would leave half of it there
        with suppress(FileNotFoundError):
            aside = _unfinished(name)
            os.rename(name, aside, src_dir_fd=parent, dst_dir_fd=parent)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    if aside is not None:
        _remove(aside, parent)


def _remove(name: str, parent: int) -> None:
    """Delete a folder, a file or a link; what cannot be deleted stays."""
    with suppress(OSError):
        try:
            os.unlink(name, dir_fd=parent)
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(name, ignore_errors=True, dir_fd=parent)


def _sweep(name: str, parent: int) -> None:
    """Delete what killed processes left of a folder `name`, and nothing that is being filled."""
    leftover = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    for entry in os.listdir(parent):
        if leftover.fullmatch(entry):
            with suppress(OSError), _locked(entry, parent, needed=True):
                _remove(entry, parent)


@contextmanager
def _locked(name: str, parent: int, *, needed: bool = False) -> Iterator[None]:
    """Hold the lock on a folder; where it is `needed`, BlockingIOError or OSError if it cannot be had."""
    handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # some file systems have no locks: there nothing is swept
            if needed:
                raise
        yield
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Force a folder's files to the disk, and its entries."""
    for path in [*(path for path in folder.rglob("*") if path.is_file() or path.is_dir()), folder]:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
