"""Make batches in a background thread while the device computes.

NumPy leaves the interpreter lock during its loops, so a thread is enough and nothing is pickled.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_END = object()


def prefetch(make: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Generator[Result]:
    """Yield `make(item)` for every item in order, up to `depth` results ahead of the consumer.

    An exception in `make` or `items` is raised here after the results before it. The thread ends when the iterator is
    exhausted, closed or collected; to end it early at a known place, use `contextlib.closing`.
    """
    results: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(make, items, results, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            result, error = results.get()
            if error is not None:
                raise error
            if result is _END:
                return
            yield result
    finally:
        stop.set()
        thread.join()


def _produce(make: Callable, items: Iterable, results: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(results, (make(item), None), stop):
                return
        _put(results, (_END, None), stop)
    except BaseException as error:  # handed to the consumer, whatever it is
        _put(results, (None, error), stop)


def _put(results: queue.Queue, entry: tuple, stop: threading.Event) -> bool:
    """Wait for a free place in the queue; False if the consumer is gone."""
    while not stop.is_set():
        try:
            results.put(entry, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
