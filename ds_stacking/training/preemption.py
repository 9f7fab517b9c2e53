"""Asked to stop: signals, a stop file, or a launcher that is gone. Every rank then saves the same step and ends.

Handlers only set a flag; the loop reduces it over ranks between steps. A second signal ends the process at once,
unless it follows so soon that it is the same event: a launcher and a terminal both pass a Ctrl-C on, and SLURM signals
the processes of a job more than once, seconds apart.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from ds_stacking.training.run_directory import STOP

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_EVENT = {signal.SIGINT: 2.0, signal.SIGTERM: 15.0, signal.SIGUSR1: 15.0}
"""Seconds after the first signal in which another one means the same."""


class StopRequest:
    """Whether this process was asked to stop, and why."""

    def __init__(self, run_dir: Path) -> None:
        self.stop_file = run_dir / STOP
        self.reason: str | None = None
        self._first = 0.0
        self._launchers = _launchers()
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Look for every kind of request; on this rank only."""
        if self.reason is None:
            if self.stop_file.exists():
                self.reason = f"the stop file {self.stop_file}"
            elif _launchers() != self._launchers:
                self.reason = "the end of the launcher"
        return self.reason is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason is not None and now - self._first > SAME_EVENT[signal.Signals(number)]:
            os._exit(128 + number)
        if self.reason is None:
            self.reason, self._first = signal.Signals(number).name, now


def _launchers() -> tuple[int, ...]:
    """The parent and, where that is DeepSpeed's inner launcher, the front process that started it.

    Nobody tells the ranks when the front is killed: the inner launcher lives on without it.
    """
    parent = os.getppid()
    try:
        is_inner = b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes()
        status = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return (parent,)
    return (parent, int(status.rsplit(")", 1)[1].split()[1])) if is_inner else (parent,)
