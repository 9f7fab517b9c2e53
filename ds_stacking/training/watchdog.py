"""Ends a process that hangs: a collective call whose partner is gone, a file system that does not answer.

The heartbeat is progress itself: an optimizer step, a micro-batch of an evaluation, a growth, a save.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from datetime import timedelta

MARGIN = 60.0
"""Seconds by which a collective call may outlast `hang_timeout`: the watchdog comes first and shows where it stood."""
LONGEST = timedelta(days=1)
"""Time limit of collective calls where the watchdog is off."""


def collective_limit(hang_timeout: float) -> timedelta:
    """The time limit of collective calls that fits a watchdog of `hang_timeout` seconds."""
    return timedelta(seconds=hang_timeout + MARGIN) if hang_timeout else LONGEST


class Watchdog:
    """A thread that ends the process by SIGABRT when no beat came for `seconds`; 0 turns it off.

    It prints where every thread stands first. The launcher then ends the other ranks. A `with` closes it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def beat(self) -> None:
        """Note progress."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                print(f"No progress for {silent:.0f} s (hang_timeout); this rank ends.", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os.kill(os.getpid(), signal.SIGABRT)
