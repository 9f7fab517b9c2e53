"""Ends a process that hangs: a collective call whose partner is gone, a file system that does not answer.

The heartbeat is progress itself: an optimizer step, a micro-batch of an evaluation, a growth, a save.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

from ds_stacking.common.streams import last_words

MARGIN = 60.0
"""Seconds by which a collective call may outlast `hang_timeout`: the watchdog comes first and shows where it stood."""
LONGEST = timedelta(days=1)
"""Time limit of collective calls where the watchdog is off."""


def collective_limit(hang_timeout: float) -> timedelta:
    """The time limit of collective calls that fits a watchdog of `hang_timeout` seconds."""
    return timedelta(seconds=hang_timeout + MARGIN) if hang_timeout else LONGEST


class Watchdog:
    """A thread that ends the process by SIGABRT when no beat came for `seconds`; 0 turns it off.

    It prints where every thread stands first. The launcher then ends the other ranks. A `with` closes it. Time in
    which the whole process was stopped (Ctrl-Z, a suspended job) does not count.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._silent = 0.0
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def beat(self) -> None:
        """Note progress."""
        self._silent = 0.0

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 4)
        last = time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            self._silent += min(now - last, 2 * tick)
            last = now
            if self._silent > self.seconds:
                last_words(f"No progress for {self._silent:.0f} s (hang_timeout); this rank ends.", stacks=True)
                os.kill(os.getpid(), signal.SIGABRT)
