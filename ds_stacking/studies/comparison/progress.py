"""What a person sees while the runs of a study run: run 5 of 18, its loss, the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_stacking.reports.table import duration


@dataclass
class Progress:
    """What a person sees while runs run: run 5 of 18, its loss, the time that is left."""

    log: Callable[[str], None]
    """Shows a line."""
    seconds: dict[str, float]
    """Expected seconds by run, of those still to do."""
    total: int
    """All runs, finished ones included."""
    at_once: int = 1
    """Runs at a time."""
    lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    begun: dict[str, tuple[int, float]] = field(default_factory=dict, init=False)
    ended: dict[str, float] = field(default_factory=dict, init=False)

    def announce(self, what: str) -> None:
        """Say what is about to run."""
        done = self.total - len(self.seconds)
        self.log(f"{what}: {self.total} runs{f', {done} of them finished' if done else ''}{self._left()}")

    def add(self, seconds: Mapping[str, float]) -> None:
        """More runs than were announced, such as another learning rate."""
        with self.lock:
            new = {path: value for path, value in seconds.items() if path not in self.seconds}
            self.seconds |= new
            self.total += len(new)

    def begin(self, path: str, stages: str) -> None:
        """A run begins."""
        with self.lock:
            number = self.total - len(self.seconds) + len(self.begun) + 1
            self.begun[path] = (number, time.monotonic())
            self.log(f"run {number} of {self.total}: {path}, {stages}{self._left()}")

    def watch(self, path: str, record: Mapping[str, Any]) -> None:
        """A run goes on; `record` is the newest of its metrics."""
        with self.lock:
            number, _ = self.begun[path]
            if "loss" in record:
                self.log(
                    f"run {number} of {self.total}: step {record.get('step')}, loss {record['loss']:.3f}{self._left()}"
                )

    def end(self, path: str, words: str) -> None:
        """A run has ended."""
        with self.lock:
            number, start = self.begun[path]
            self.ended[path] = time.monotonic() - start
            self.log(f"run {number} of {self.total}: {words}{self._left()}")

    def _left(self) -> str:
        """The time that is left: what was expected, times what ended runs took beside what was expected of them."""
        known = self.ended.keys() & self.seconds.keys()
        expected = sum(self.seconds[path] for path in known)
        factor = sum(self.ended[path] for path in known) / expected if expected else 1.0
        now = time.monotonic()
        left = 0.0
        for path, seconds in self.seconds.items():
            if path not in self.ended:
                spent = now - self.begun[path][1] if path in self.begun else 0.0
                left += max(0.0, factor * seconds - spent)
        return f"; about {duration(left / self.at_once)} left" if left else ""
