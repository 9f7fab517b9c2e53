"""The parent of the processes that run rows: it writes the journal, keeps to the time, outlives crashes and hangs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.catalogue import Row, present
from benchmarks.gpu_check.journal import Journal, Record

START = 12.0
"""Seconds that a new process takes before its first row."""
OURS = {"", "ours", "timing"}
"""What a row says it is at while no single peer is to blame for its end."""


class Lost(Exception):
    """The process hung or ended without an answer, while it was at `at`."""

    def __init__(self, reason: str, at: str) -> None:
        super().__init__(reason)
        self.at = at


class Worker:
    """A process that runs rows."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
            )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, request: dict[str, Any], limit: float) -> Record:
        """The answer. Raises Lost after `limit` seconds, or where the process ends first."""
        assert self.process.stdin is not None
        deadline, at = time.monotonic() + limit, ""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            while True:
                line = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
                if line is None:
                    raise BrokenPipeError
                answer = json.loads(line)
                if "row" in answer:
                    return answer
                at = answer["doing"]
        except queue.Empty:
            self.kill()
            raise Lost(f"no answer within {limit:.0f} s", at) from None
        except BrokenPipeError:
            self.kill()
            raise Lost(f"the process ended with {self.process.returncode}: {self._last_words()}", at) from None

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-400:].strip()

    def close(self) -> None:
        """Let it end, and end it if it does not, with what it left running."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(10)
        self.kill()

    def kill(self) -> None:
        """End it with all that it started, which may hold the GPU after it has ended itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: the table is worth more
            self.process.wait(10)


def worker_command(dry: bool) -> list[str]:
    """The program of a worker."""
    return [sys.executable, "-m", "benchmarks.gpu_check.worker", *(["--dry"] * dry)]


@dataclass(kw_only=True)
class Check:
    """A run over rows."""

    journal: Journal
    command: Sequence[str]
    log: Path
    deadline: float
    """On time.monotonic's clock."""
    patience: float = 1.0
    """What the rows' limits are multiplied with; their estimates are those of a GPU."""
    show: Callable[[str], None] = print
    left_out: list[str] = field(default_factory=list)
    """Rows that did not fit into the time."""
    worker: Worker | None = None
    part: str = ""
    spent: dict[str, list[float]] = field(default_factory=dict)
    """By part: measured and estimated seconds."""

    def run(self, todo: Sequence[Row]) -> None:
        """Run rows in order; those of a part share a process until it is lost."""
        for index, row in enumerate(todo):
            absent = [name for name in row.needs if not present(name)]
            if absent:
                self._keep({"row": row.name, "skipped": f"{', '.join(absent)} absent"})
                continue
            if self._left() < self.estimate(row):
                self.left_out.append(row.name)
                continue
            later = [other.name for other in todo[index + 1 :]]
            if self._one(row, later) or not row.vital:
                continue
            self.left_out += later
            break
        self._close()

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def estimate(self, row: Row) -> float:
        """Seconds that the row will take, corrected by those of its part that have run."""
        measured, estimated = self.spent.get(row.part, [0.0, 0.0])
        starts = 0.0 if self.worker is not None and self.part == row.part else START
        return starts + row.seconds * (measured + 5) / (estimated + 5)

    def _one(self, row: Row, pending: list[str]) -> bool:
        """One row, once more without the peer that took the process with it; whether there is a result."""
        without: list[str] = []
        for _ in range(3):
            begin = time.monotonic()
            limit = self._left() if row.takes_the_rest else self.patience * (START + row.limit)
            request = {"row": row.name, "without": without, "pending": pending, "left": self._left()}
            cut = self._left() <= limit
            try:
                answer = self._ask(row, request, limit)
            except Lost as lost:
                self._close()
                if cut and self._left() <= 1:
                    self.left_out.append(row.name)
                    return False
                answer = {"row": row.name, "error": str(lost), "at": lost.at}
            if answer.get("lost"):
                self._close()
            spent = self.spent.setdefault(row.part, [0.0, 0.0])
            spent[0] += time.monotonic() - begin
            spent[1] += row.seconds
            self._keep(answer)
            peer = answer.get("at", "")
            if "error" not in answer or peer in OURS or peer in without or self._left() < self.estimate(row):
                return "error" not in answer
            without.append(peer)
        return False

    def _ask(self, row: Row, request: dict[str, Any], limit: float) -> Record:
        if self.worker is None or self.part != row.part:
            self._close()
            self.worker, self.part = Worker(self.command, self.log), row.part
        return self.worker.ask(request, min(limit, max(1.0, self._left())))

    def _keep(self, record: Record) -> None:
        self.journal.append(record)
        state = record.get("error") or record.get("skipped") or ("WRONG" if record.get("ok") is False else "done")
        self.show(f"{record['row']}: {str(state).splitlines()[0][:150]} ({record.get('seconds', 0):.1f} s)")

    def _close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
