"""What one rank meets, all ranks know: a part of a growth succeeds on all of them, or fails on all.

Ranks report through the process group's store, never by a collective call: that works for a rank whose device has no
memory left, and cannot meet a collective call that another rank is still waiting in. Under NCCL it is the device that
waits, while the host goes on; so a rank reports success only when its device has done all that it was asked for.
"""

from __future__ import annotations

import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_stacking.common.errors import OtherRankFailed, UserError

PATIENCE = 15.0
"""Seconds from the first failure in which the other ranks must report; those that do not wait for a rank in vain."""
LONGEST_PAUSE = 0.1
"""Seconds between two looks at the store, at most: a thousand ranks look at one store."""
_numbers = itertools.count()


class CollectiveDeadlock(RuntimeError):
    """A rank failed and others wait for it in a collective call: no rank can go on, the run must end."""


@contextmanager
def all_ranks_or_none(what: str) -> Iterator[None]:
    """Leave the body on all ranks, or on none. All ranks enter together; the body may hold collective calls.

    A rank on which the body raised raises that again. The others raise OtherRankFailed, or UserError where it was one.
    Raises CollectiveDeadlock where a rank failed while others, or their devices, wait for it inside the body.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
        traceback.clear_frames(caught.__traceback__)  # they hold what was half built
    failure = _report(what, error)
    if error is not None:
        raise error
    if failure is not None:
        raise failure


def _report(what: str, error: Exception | None) -> RuntimeError | UserError | None:
    """Report to the other ranks and wait for their reports; the first failure, as ranks raise it that had none."""
    reports = _Reports()
    if error is None:
        try:
            reports.wait(device_work())
        except CollectiveDeadlock:
            raise
        except Exception as caught:  # the device tells only now what went wrong there
            error = caught
    store = reports.store
    if error is not None:
        store.compare_set("failed", "", _write(what, error))
    if store.add("reports", 1) == dist.get_world_size():
        store.set("all", "")
    reports.wait(lambda: store.check(["all"]), error)
    return _read(store) if store.check(["failed"]) else None


class _Reports:
    """One round of reports, which all ranks number alike."""

    def __init__(self) -> None:
        self.store = dist.PrefixStore(f"agreed/{next(_numbers)}", dist.distributed_c10d._get_default_store())
        self._end = float("inf")

    def wait(self, until: Callable[[], bool], error: Exception | None = None) -> None:
        """Look until `until()` holds. Raises CollectiveDeadlock where a rank has failed and others stay silent."""
        pause = 0.001
        while not until():
            if self._end == float("inf") and self.store.check(["failed"]):
                self._end = time.monotonic() + PATIENCE
            if time.monotonic() > self._end:
                self.store.set("stranded", "")
            if self.store.check(["stranded"]):
                break
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if self.store.check(["stranded"]):  # also for a rank that reports too late
            silent = dist.get_world_size() - self.store.add("reports", 0)
            raise CollectiveDeadlock(f"{_read(self.store)}; {silent} ranks wait for it and cannot go on") from error


def device_work() -> Callable[[], bool]:
    """Tells when this rank's device has done what it was asked for until now, collective calls above all."""
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        return lambda: True
    event = accelerator.Event()
    event.record()
    return event.query


def _write(what: str, error: Exception) -> str:
    known = isinstance(error, UserError | OtherRankFailed)
    words = str(error) if known else f"rank {dist.get_rank()} failed while {what}: {type(error).__name__}: {error}"
    return json.dumps({"bad_input": isinstance(error, UserError), "words": words.partition("\n")[0]})


def _read(store: dist.Store) -> RuntimeError | UserError:
    failure = json.loads(store.get("failed"))
    return (UserError if failure["bad_input"] else OtherRankFailed)(failure["words"])
