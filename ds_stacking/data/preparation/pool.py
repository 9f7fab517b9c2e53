"""Worker processes that clean and tokenise: started so that Ctrl-C is the parent's affair, and killed with it.

They write nothing, and who leaves the pool has the results that it wants: no worker's call is waited for.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context
from typing import TypeVar

from ds_stacking.common.errors import RunFailed
from ds_stacking.data.preparation import worker

Item = TypeVar("Item")
Result = TypeVar("Result")
ALONE = 32
"""Batches that one process works through in the seconds that the others would take to start and pay off."""
_MOST = 16
"""What one process reads keeps no more of them busy."""


def each(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    setting: worker.WorkerConfig | None = None,
    *,
    alone: int = ALONE,
) -> Generator[tuple[Item, Result]]:
    """Yield every item with `function(item)`, in order, computed ahead by worker processes; close it to end them.

    With 0 workers this process does the first `alone` items by itself, which is all of a small source; for the others
    there is one worker per core, but no more than one reader feeds.
    """
    items = iter(items)
    if not workers:
        if setting is not None:
            worker.load(setting)
        yield from ((item, function(item)) for item in islice(items, alone))
        if (following := next(items, None)) is None:
            return
        items, workers = chain((following,), items), min(_MOST, len(os.sched_getaffinity(0)))
    with worker_pool(workers, setting) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for item, future in waiting:
            yield item, future.result()


@contextmanager
def worker_pool(workers: int, setting: worker.WorkerConfig | None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; a fresh interpreter each, since threads of a tokenizer do not survive a fork.

    Raises RunFailed where one is lost.
    """
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=worker.start, initargs=(setting,))
    try:
        with _without_interrupts():
            for _ in range(workers):
                pool.submit(worker.clean, [])  # each starts one
        yield pool
    except BrokenProcessPool as error:
        raise RunFailed(
            "A worker was killed, most likely for lack of memory. Finished shards are kept: run the same command "
            "again, with fewer --workers (of a run: --corpus.workers)."
        ) from error
    finally:
        _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    """Kill the workers, which may be in a long call, and wait for nothing else."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    if pool._result_queue is not None:
        pool._result_queue._writer.close()  # type: ignore[attr-defined]  # half a result of a killed worker: its end
    pool.shutdown(cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes started meanwhile, from their first moment; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
