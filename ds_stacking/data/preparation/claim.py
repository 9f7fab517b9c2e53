"""Whose a prepared folder is while it is made: claimed under a lock, given back by who fails before the first shard.

What binds a folder to its settings is a finished shard. Without one the next command may be another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.files import is_leftover, write_json
from ds_stacking.common.json_files import read_json
from ds_stacking.common.own_files import refuse_links
from ds_stacking.data.manifests import MANIFEST, Begun, is_unfinished_shard, shard_folders
from ds_stacking.data.names import first_line, printable
from ds_stacking.data.preparation.build import remove

BEGUN = "preparation.json"
TOKENIZER = "tokenizer"
_LOCK = ".lock"


@contextmanager
def claimed(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the folder's lock, after making sure that it is empty or was begun with the same settings.

    Bad input that is met before the first shard leaves no trace. Raises UserError.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _refuse_others(folder, identity)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another process prepares {printable(folder)}; wait for it, or choose another --output_dir."
        ) from None
    except OSError as error:
        _remove_empty(missing)
        raise UserError(
            f"{printable(folder)} cannot be written ({error.strerror}); choose another --output_dir."
        ) from error
    try:
        _refuse_others(folder, identity)  # now that nobody else can change it
        if not shard_folders(folder):
            _clear(folder, but=(TOKENIZER,) if _begun(folder) == identity else ())
            write_json(folder / BEGUN, identity, inside=folder)
        yield
    except UserError:
        if not shard_folders(folder):
            _clear(folder)
            (folder / _LOCK).unlink(missing_ok=True)
            _remove_empty(missing)
        raise
    finally:
        lock.release()


@contextmanager
def stopped(folder: Path) -> Iterator[None]:
    """Turn what ends a preparation from outside, a full disk or Ctrl-C, into RunFailed: the same command goes on."""
    go_on = "then give the same command again: it goes on behind the last finished shard"
    try:
        yield
    except OSError as error:
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        raise RunFailed(
            f"Preparing {printable(folder)} stopped: {error.strerror or first_line(error)}{where}; mend that, such "
            f"as by making room on the disk, {go_on}."
        ) from error
    except KeyboardInterrupt:
        raise RunFailed(
            f"Preparing {printable(folder)} was stopped by Ctrl-C; give the same command to go on."
        ) from None


def _refuse_others(folder: Path, identity: dict[str, Any]) -> None:
    """Raise UserError for a folder that holds something else, or shards that were made with other settings."""
    if not folder.is_dir():
        return
    refuse_links(folder, (_LOCK, BEGUN, MANIFEST, TOKENIZER, f".{TOKENIZER}"))
    ours = {_LOCK, BEGUN}
    if not (folder / BEGUN).is_file():
        if any(path.name not in ours and not is_leftover(path) for path in folder.iterdir()):
            raise UserError(f"{printable(folder)} holds other files; choose another --output_dir.")
        return
    if (begun := _begun(folder)) is None:
        raise UserError(
            f"{printable(folder)} holds other files: its {BEGUN} is not one of prepare_data.py; restore it, or choose "
            f"another --output_dir."
        )
    if not shard_folders(folder):
        return
    if different := [name for name in identity if begun.get(name) != identity[name]]:
        raise UserError(
            f"{printable(folder)} was begun with another {', '.join(different)}; "
            f"give the same options and unchanged files, or choose another --output_dir."
        )


def _begun(folder: Path) -> dict[str, Any] | None:
    """What the folder was begun with, None where nobody can tell: the file is written whole, or not at all."""
    try:
        return dict(read_json(folder / BEGUN, Begun, mend="", inside=folder))
    except (UserError, OSError):
        return None


def _clear(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Remove what preparing writes before and beside the shards."""
    mine = {BEGUN, MANIFEST, TOKENIZER, f".{TOKENIZER}", "card.md", "lengths.png"} - set(but)
    for path in folder.iterdir():
        if path.name in mine or is_unfinished_shard(path) or is_leftover(path):
            remove(path)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, the innermost first."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()
