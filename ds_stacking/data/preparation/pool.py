"""Worker processes that clean and tokenise: started so that Ctrl-C is the parent's affair, and killed with it.

They write nothing, and who leaves the pool has the results that it wants: no worker's call is waited for.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from ds_stacking.common.errors import RunFailed
from ds_stacking.data.preparation import worker


@contextmanager
def worker_pool(workers: int, setting: worker.WorkerConfig | None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; a fresh interpreter each, since threads of a tokenizer do not survive a fork.

    Raises RunFailed where one is lost.
    """
    count = count_workers(workers)
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=worker.start, initargs=(setting,))
    try:
        with _without_interrupts():
            for _ in range(count):
                pool.submit(worker.clean, [])  # each starts one
        yield pool
    except BrokenProcessPool as error:
        raise RunFailed(
            "A worker was killed, most likely for lack of memory. Finished shards are kept: run the same command "
            "again, with fewer --workers."
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


def count_workers(workers: int) -> int:
    """The number asked for, else one per core."""
    return workers or len(os.sched_getaffinity(0))


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes started meanwhile, from their first moment; this one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
