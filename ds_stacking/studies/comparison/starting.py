"""Starting pretrain.py for one run of a study: pinned to a core if wanted, watched, asked to stop by a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from filelock import FileLock, Timeout

from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.common.own_files import make_inside, open_inside, read_inside
from ds_stacking.common.words import plain
from ds_stacking.training.run_directory import CONFIG, METRICS, STOP

LAST_WORDS = 1 << 16
"""Bytes at the end of a log in which a run's last words are looked for."""
POLL, LOG_EVERY, WAIT = 0.2, 60.0, 1.0
"""Seconds between two looks at a run, between two lines about it, and that a lock is waited for at a time."""
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask to stop; the runs do not get them, since they have sessions of their own."""
SUPERVISED = (sys.executable, "-I", "-S", str(Path(__file__).with_name("supervisor.py")))
"""Starts a command that ends with this process."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(kw_only=True)
class Slot:
    """Where a run runs."""

    cores: set[int] | None = None
    """Cores that it is pinned to, with one thread; None leaves it where the system puts it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that it gets beside those that are there."""


def slots(parallel: int, *, pinned: bool, gpus: Sequence[str] = ()) -> list[Slot]:
    """One slot for each run at a time.

    Args:
        parallel: Runs at a time.
        pinned: Give each a core of its own and one thread.
        gpus: Names of the devices, as in CUDA_VISIBLE_DEVICES; where there are any, each run gets one of its own.

    Raises:
        UserError: Where there are fewer devices or cores than runs at a time.
    """
    if gpus:
        if parallel > len(gpus):
            raise UserError(f"parallel is {parallel}, and there are {len(gpus)} GPUs; give --parallel {len(gpus)}.")
        alone = parallel == 1
        return [Slot()] if alone else [Slot(environment={"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:parallel]]
    if not pinned:
        return [Slot() for _ in range(parallel)]
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        raise UserError(f"parallel is {parallel}, and there are {len(cores)} cores; give --parallel {len(cores)}.")
    one = dict.fromkeys(THREADS, "1")
    return [Slot(cores={core}, environment=one) for core in cores[:parallel]]


@dataclass(kw_only=True)
class Starter:
    """Starts runs in a study's folder, as many at a time as there are slots."""

    folder: Path
    """The study's folder, below which no link is followed."""
    launch: Sequence[str]
    """The command that starts pretrain.py, up to its options."""
    slots: Sequence[Slot]
    """Where runs run."""
    reason: str | None = field(default=None, init=False)
    """The signal that asked to stop."""
    free: Queue[Slot] = field(default_factory=Queue, init=False)

    def __post_init__(self) -> None:
        for slot in self.slots:
            self.free.put(slot)

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """These signals stop the runs, each after its step, as long as the body runs."""
        kept = {number: signal.signal(number, self._stop) for number in STOPPING if _is_heard(number)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name

    def start(
        self, path: Path, options: Sequence[str], watch: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[int, str]:
        """Start pretrain.py for the run directory `path` and wait for its end; its exit code and last words.

        `watch` is given the newest record of its metrics from time to time. Raises RunAgain when asked to stop.
        """
        slot = self.free.get()
        try:
            return self._start(slot, path, options, watch)
        finally:
            self.free.put(slot)

    def _start(
        self, slot: Slot, path: Path, options: Sequence[str], watch: Callable[[dict[str, Any]], None] | None
    ) -> tuple[int, str]:
        self.refuse_if_stopped(path)
        make_inside(self.folder, *path.parent.relative_to(self.folder).parts)
        name = str(path.with_suffix(".log").relative_to(self.folder))
        with open(open_inside(self.folder, name, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b", buffering=0) as log:
            begin = log.seek(0, os.SEEK_END)
            cores = ",".join(map(str, sorted(slot.cores or ())))
            # A session of its own: Ctrl-C shall reach this process alone, which then asks by a file.
            process = subprocess.Popen(
                [*SUPERVISED, str(os.getpid()), cores, *self.launch, *options, f"--output_dir={path}"],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **slot.environment},
            )
            self._wait(process, path, watch)
            log.seek(max(begin, log.seek(0, os.SEEK_END) - LAST_WORDS))
            last = last_words(log.read().decode(errors="replace"))
        if self.reason:
            (path / STOP).unlink(missing_ok=True)
            self.refuse_if_stopped(path)
        return process.returncode, last

    def _wait(
        self, process: subprocess.Popen[bytes], path: Path, watch: Callable[[dict[str, Any]], None] | None
    ) -> None:
        logged = time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
                return
            if self.reason and (path / CONFIG).exists():
                os.close(open_inside(path, STOP, os.O_WRONLY | os.O_CREAT))
            if watch and time.monotonic() - logged >= LOG_EVERY:
                logged = time.monotonic()
                watch(newest_record(path))

    @contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Hold the file lock `path`, waited for as long as nobody asks to stop. Raises RunAgain."""
        lock = FileLock(path)
        while True:
            self.refuse_if_stopped(path)
            with suppress(Timeout):
                lock.acquire(timeout=WAIT)
                break
        try:
            yield
        finally:
            lock.release()

    def refuse_if_stopped(self, path: Path) -> None:
        """Raise RunAgain where a signal has asked to stop."""
        if self.reason:
            raise RunAgain(f"stopped by {self.reason} in {path}; the same command goes on")


def _is_heard(number: signal.Signals) -> bool:
    """Whether a signal is to be heard: `nohup` asks for no SIGHUP."""
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def newest_record(path: Path) -> dict[str, Any]:
    """The newest record with a loss of a run that goes on; empty where there is none yet."""
    try:
        lines = read_inside(path, METRICS).splitlines()
    except (OSError, UserError):
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that is just being written
        if isinstance(record, dict) and isinstance(record.get("loss"), float):
            return record
    return {}


def last_words(text: str) -> str:
    """The last thing that a run said; a line that begins with `error: ` before any other."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return plain(found) or "it said nothing"
