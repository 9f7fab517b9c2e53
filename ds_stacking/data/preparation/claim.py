"""Whose a prepared folder is while it is made: claimed under a lock, given back by who fails before the first shard.

What binds a folder to its settings is a finished shard. Without one the next command may be another. In the cache
processes wait for each other, so an entry has a lock beside it too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ds_stacking.common.environment import world_size
from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.files import is_leftover, write_json
from ds_stacking.common.json_files import read_json
from ds_stacking.common.own_files import refuse_links
from ds_stacking.data.manifests import BEGUN, MANIFEST, TOKENIZER, Begun, is_unfinished_shard, shard_folders
from ds_stacking.data.names import first_line, printable
from ds_stacking.data.preparation.build import remove

_LOCK = ".lock"


@contextmanager
def claimed(folder: Path, identity: dict[str, Any], mend: str) -> Iterator[None]:
    """Hold the folder's lock, after making sure that it is empty or was begun with the same settings.

    Bad input that is met before the first shard leaves no trace; `mend` says what to do where the folder is not to be
    had. Raises UserError.
    """
    identity = json.loads(json.dumps(identity))
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _refuse_others(folder, identity, mend)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process prepares {printable(folder)}; wait for it, or {mend}.") from None
    except OSError as error:
        _remove_empty(missing)
        raise UserError(f"{printable(folder)} cannot be written ({error.strerror}); {mend}.") from error
    try:
        _refuse_others(folder, identity, mend)  # now that nobody else can change it
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
def stopped(folder: Path, mend: str) -> Iterator[None]:
    """Turn a full or failing disk into RunFailed, one sentence that ends with `mend`."""
    try:
        yield
    except OSError as error:
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        raise RunFailed(
            f"Preparing {printable(folder)} stopped: {error.strerror or first_line(error)}{where}; {mend}."
        ) from error


def locked(root: Path, key: str, log: Callable[[str], None]) -> AbstractContextManager:
    """Acquire the lock of one entry of the cache, however long that takes; the end of the `with` releases it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        refuse_links(root, (f"{key}.lock", key, f".{key}"))
        # all ranks together ask the storage 50 times a second, or each every 10 s
        lock = FileLock(root / f"{key}.lock", poll_interval=min(10.0, max(0.05, world_size() / 50)))
        try:
            return lock.acquire(timeout=1)
        except Timeout:
            log("Waiting for another process that prepares the same data.")
            return lock.acquire()
    except OSError as error:
        raise UserError(
            f"The cache folder {root} cannot be written ({error.strerror}); "
            f"set corpus.cache_dir or $DS_STACKING_CACHE."
        ) from error


def _refuse_others(folder: Path, identity: dict[str, Any], mend: str) -> None:
    """Raise UserError for a folder that holds something else, or shards that were made with other settings."""
    if not folder.is_dir():
        return
    refuse_links(folder, (_LOCK, BEGUN, MANIFEST, TOKENIZER, f".{TOKENIZER}"))
    ours = {_LOCK, BEGUN}
    if not (folder / BEGUN).is_file():
        if any(path.name not in ours and not is_leftover(path) for path in folder.iterdir()):
            raise UserError(f"{printable(folder)} holds other files; {mend}.")
        return
    if (begun := _begun(folder)) is None:
        raise UserError(
            f"{printable(folder)} holds other files: its {BEGUN} is not one of prepare_data.py; restore it, or {mend}."
        )
    if not shard_folders(folder):
        return
    if different := [name for name in identity if begun.get(name) != identity[name]]:
        raise UserError(
            f"{printable(folder)} was begun with another {', '.join(different)}; "
            f"give the same options and unchanged files, or {mend}."
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
