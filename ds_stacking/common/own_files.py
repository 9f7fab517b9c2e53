"""Files inside a folder that may have come from somebody else: nothing is reached through a link that lies in it.

The folder itself may be a link, for its user has named it. Below it a link could lead anywhere: a report would be
written over a foreign file, a secret read as an id. Every component is opened relative to the one before
(`O_NOFOLLOW`), so a link that appears meanwhile is not followed either.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from ds_stacking.common.errors import UserError

LIMIT = 1 << 28
"""Bytes of a file that is read whole, unless the reader says otherwise."""


def is_inside(name: str) -> bool:
    """Whether `name` is the relative path of something in a folder: not empty, not absolute, without `..` or NUL."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def open_inside(folder: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the file `name` of `folder`, links not followed below it; new files have the umask's modes.

    Raises UserError for a link, a path that leaves the folder, and what is neither file nor, with `O_DIRECTORY`,
    folder (a pipe, a device); OSError, such as FileNotFoundError, as `os.open` does.
    """
    if not is_inside(name):
        raise UserError(f"{name!r} leads out of {folder}; only files in that folder are used.")
    *folders, last = PurePath(name).parts
    with open_folder(folder, *folders) as parent:
        # O_NONBLOCK: a pipe without a writer would be waited for
        handle = _no_link(folder / name, last, flags | os.O_NONBLOCK, parent)
    if not flags & os.O_DIRECTORY and not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{folder / name} is no regular file; remove it.")
    return handle


@contextmanager
def open_folder(folder: Path, *names: str) -> Iterator[int]:
    """A descriptor of `folder`/`names`, links not followed below `folder`. Raises UserError for a link, OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        path = folder
        for name in names:
            path /= name
            inner = _no_link(path, name, os.O_RDONLY | os.O_DIRECTORY, handle)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def read_inside(folder: Path, name: str, *, limit: int = LIMIT) -> bytes:
    """The content of the file `name` of `folder`, links not followed. Raises UserError, also for a larger file."""
    handle = open_inside(folder, name)
    with open(handle, "rb") as file:
        return _read_all(file.fileno(), folder / name, limit)


def read_named(path: Path, *, limit: int = LIMIT) -> bytes:
    """The content of a file that its user has named, links followed. Raises UserError for a larger file, OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would be waited for
    try:
        os.set_blocking(handle, True)
        return _read_all(handle, path, limit)
    finally:
        os.close(handle)


def _read_all(handle: int, path: Path, limit: int) -> bytes:
    """The content of an open file. Raises UserError where it has more than `limit` bytes, whatever its size says."""
    with open(handle, "rb", closefd=False) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit:,} bytes, which no such file needs; it is not read.")
    return content


def make_inside(folder: Path, *names: str) -> Path:
    """Make the folders `names`, each in the one before, and the first in `folder`. Raises UserError for a link."""
    made: list[str] = []
    for name in names:
        with open_folder(folder, *made) as parent, suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
        made.append(name)
    with open_folder(folder, *made):
        return folder.joinpath(*names)


def refuse_links(folder: Path, names: Iterator[str] | tuple[str, ...]) -> None:
    """Raise UserError where one of the `names` in `folder` is a link: for what libraries are to open by its path."""
    for name in names:
        if (folder / name).is_symlink():
            raise _link(folder / name)


def _no_link(path: Path, name: str, flags: int, parent: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=parent)
    except OSError as error:
        # a link gives ELOOP, and ENOTDIR where a folder was asked for; a pipe without a reader ENXIO
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO) and _is_link(name, parent):
            raise _link(path) from None
        if error.errno == errno.ENXIO:
            raise UserError(f"{path} is no regular file; remove it.") from None
        error.filename = str(path)
        raise


def _is_link(name: str, parent: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _link(path: Path) -> UserError:
    return UserError(
        f"{path} is a link to {os.readlink(path)}; links inside such a folder are not followed: put the "
        f"file or folder itself there, or remove the link."
    )
