"""The background thread: order, end, exceptions, no thread left."""

import threading
from contextlib import closing

import pytest

from ds_stacking.data.prefetch import prefetch


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_results_come_in_order_and_the_thread_ends():
    assert list(prefetch(lambda x: x * x, range(100), depth=3)) == [x * x for x in range(100)]
    assert list(prefetch(str, [])) == []
    assert prefetch_threads() == 0


def test_it_works_ahead_by_depth_and_no_more():
    made: list[int] = []
    reached = threading.Event()

    def make(x: int) -> int:
        made.append(x)
        if x == 3:
            reached.set()
        return x

    with closing(prefetch(make, range(100), depth=2)) as results:
        assert next(results) == 0
        assert reached.wait(10)  # 1 and 2 wait in the queue, 3 in the thread's hand
    assert made == [0, 1, 2, 3]
    assert prefetch_threads() == 0


def test_an_exception_reaches_the_consumer_after_the_results_before_it():
    def make(x: int) -> float:
        return 1 / (2 - x)

    results = prefetch(make, range(5))
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert prefetch_threads() == 0


def test_an_exception_of_the_items_reaches_the_consumer():
    def items():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(prefetch(str, items()))
