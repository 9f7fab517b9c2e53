"""The cache of prepared data: where it is, and the locks that let one process make an entry while others wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from ds_stacking.common.environment import cache_folder, world_size
from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig


def cache_root(config: CorpusConfig) -> Path:
    """`config.cache_dir`, else $DS_STACKING_CACHE, else ~/.cache/ds_stacking."""
    return cache_folder(config.cache_dir)


def _pause() -> float:
    """Seconds between two tries for a lock: all ranks together ask the storage 50 times a second, or every 10 s."""
    return min(10.0, max(0.05, world_size() / 50))


def locked(root: Path, key: str, log: Callable[[str], None]) -> AbstractContextManager:
    """Acquire the lock of one cache entry; the end of the `with` releases it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock", poll_interval=_pause())
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
