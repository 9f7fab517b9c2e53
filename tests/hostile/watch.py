"""A watched folder: what every file, folder and link in it was, and what has become of them."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

State = dict[str, tuple[object, ...]]


def state(folder: Path) -> State:
    """Kind, permissions and content of all that lies in a folder, by path; times are not part of it."""
    found: State = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            kind = path.lstat()
            content: object = None
            if stat.S_ISLNK(kind.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(kind.st_mode):
                content = kind.st_size if kind.st_size > 1 << 27 else hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (stat.S_IFMT(kind.st_mode), stat.S_IMODE(kind.st_mode), content)
    return found


def changes(before: State, after: State) -> list[str]:
    """The paths that came, went or are others now."""
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


def files_with(folder: Path, text: bytes) -> list[str]:
    """The regular files of a folder that hold a text, links not followed."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 27 and text in path.read_bytes()
    ]
