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
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which gets the name `path` when the `with` ends, and is gone where that raises."""
    # not the process's number: two hosts may have the same one
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all; a number that is not finite becomes null. Raises TypeError."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


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
