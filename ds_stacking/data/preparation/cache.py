"""The cache of prepared data: where it is, and the locks that let one process make an entry while others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ds_stacking.common.environment import cache_folder, world_size
from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.own_files import refuse_links
from ds_stacking.config import CorpusConfig
from ds_stacking.data.names import first_line


def cache_root(config: CorpusConfig) -> Path:
    """`config.cache_dir`, else $DS_STACKING_CACHE, else ~/.cache/ds_stacking."""
    return cache_folder(config.cache_dir)


def _pause() -> float:
    """Seconds between two tries for a lock: all ranks together ask the storage 50 times a second, or every 10 s."""
    return min(10.0, max(0.05, world_size() / 50))


@contextmanager
def unstopped(root: Path) -> Iterator[None]:
    """Turn a full or failing disk into RunFailed, one sentence; what was written is removed by who wrote it."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"Preparing data in the cache {root} stopped: {error.strerror or first_line(error)}; make room, or set "
            f"corpus.cache_dir or $DS_STACKING_CACHE to another disk, and start again."
        ) from error


def locked(root: Path, key: str, log: Callable[[str], None]) -> AbstractContextManager:
    """Acquire the lock of one cache entry; the end of the `with` releases it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        refuse_links(root, (f"{key}.lock", key))
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
