"""Files that are whole or absent: written under another name, forced to the disk, renamed.

A process may be killed, and a machine may lose its power, between any two lines: under a file's name then stands what
stood there before, or all of the new content. Permissions are those that the umask leaves. What a killed writer left
is known by its name (`is_leftover`); it may be deleted by whoever knows that nobody else writes in the folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ds_stacking.common.own_files import open_folder

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


@contextmanager
def whole_file(path: Path, *, inside: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write to, which gets the name `path` when the `with` ends, and is gone where that raises.

    Below `inside`, a folder above the file, no link is followed; without it, the user has named the file.
    """
    # not the process's number: two hosts may have the same one
    temporary = f".{path.name}.{secrets.token_hex(8)}.tmp"
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
