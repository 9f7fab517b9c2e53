"""Where a command is to write: refused in one sentence before anything is made, or when the disk does not take it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.words import shown


def check_output_folder(text: str, option: str) -> Path:
    """The folder that `option` names, which is there or can be made. Writes nothing. Raises UserError."""
    path, existing = _existing(text, option, "a folder")
    if not os.path.isdir(existing):
        raise UserError(f"{option} {shown(text)} cannot be made: {existing} is no folder; choose another.")
    _require_writable(existing, text, option)
    return path


def check_output_file(text: str, option: str) -> Path:
    """The file that `option` names, in a folder that is there. Writes nothing. Raises UserError."""
    path, _ = _existing(text, option, "a file")
    if path.is_dir():
        raise UserError(f"{option} {shown(text)} is a folder; name a file.")
    if not path.parent.is_dir():
        raise UserError(f"{option} {shown(text)} lies in no folder that is there; make {shown(str(path.parent))}.")
    _require_writable(path.parent, text, option)
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into RunFailed, one sentence; UserError passes."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{path} cannot be written ({error.strerror or error}); what stood there stays. Make room or mend that, "
            f"and give the same command again."
        ) from error


def _existing(text: str, option: str, what: str) -> tuple[Path, Path]:
    """The path, and what of it is there already."""
    if not text.strip():
        raise UserError(f"{option} is {text!r}; name {what}.")
    path = Path(text)
    try:
        return path, next(folder for folder in (path, *path.absolute().parents) if _is_there(folder))
    except (OSError, ValueError) as error:  # too long a name, links in a circle, a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{option} {shown(text)} cannot be used ({reason}); choose another.") from None


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise OSError(f"the link {path} leads nowhere") from None
        return False
    return True


def _require_writable(folder: Path, text: str, option: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {shown(text)}: no permission to write in {folder}; choose another.")
