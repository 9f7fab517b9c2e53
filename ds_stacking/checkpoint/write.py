"""Saving: the training loop waits for the copy out of the engine only, and no failed write ever stops it."""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_stacking.checkpoint.durable import remove_leftovers
from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.checkpoint.job import SaveError, SaveJob, explain
from ds_stacking.checkpoint.manifest import Unusable
from ds_stacking.checkpoint.retention import prune
from ds_stacking.checkpoint.snapshot import Snapshot, pieces_to_write
from ds_stacking.checkpoint.verify import verify
from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.common.generators import capture_generators
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.holdings import holdings
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import StateReader

TOGETHER = 0.05
"""Seconds between two looks at the other ranks while all wait for a save."""


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """How a save ended on this rank."""

    step: int
    path: Path | None = None
    """The published checkpoint, on rank 0."""
    seconds: float = 0.0
    """From the call until it was on the disk."""
    error: str | None = None
    """Why there is no such checkpoint; the ones before it stay."""
    warning: str | None = None
    """What else went wrong although it was saved."""

    @property
    def line(self) -> str:
        """The report in one line."""
        if self.error:
            return (
                f"The checkpoint at step {self.step} was not saved: {self.error}. Older ones stay; training goes on."
            )
        saved = f"Checkpoint at step {self.step} saved in {self.seconds:.1f} s."
        return f"{saved} {self.warning}" if self.warning else saved


class CheckpointWriter:
    """Saves checkpoints into one folder. Every rank has one and calls `save` and `wait` together with the others.

    Nothing here raises because of the disk: what went wrong is found in `reports()`.
    """

    def __init__(
        self,
        folder: Path,
        exchange: Exchange,
        *,
        identity: Mapping[str, Any],
        keep: int = 2,
        asynchronous: bool = True,
        patience: float = 600.0,
        holds: Callable[[], bool] = lambda: True,
        record: Path | None = None,
        verified: Sequence[Path] = (),
    ) -> None:
        """Make a writer; the folder itself is made by the first save.

        identity      plain JSON values that a run must share with this one to load its checkpoints
        keep          newest valid checkpoints that stay beside those saved with `keep=True`
        asynchronous  write in a background thread
        patience      seconds after which a rank that is not done, or a write under way, is given up
        holds         whether the folder is still this run's: asked before anything in it is deleted or published
        record        file outside the folder that names the newest checkpoint: so an empty folder can be told from a
                      lost one
        verified      checkpoints that were read to the last byte already, which no save need read again
        """
        if keep < 1:
            raise UserError(f"keep is {keep}; at least 1 checkpoint must be kept.")
        self.folder, self.exchange, self.identity = folder.absolute(), exchange, dict(identity)
        self.keep, self.asynchronous, self.patience = keep, asynchronous, patience
        self.holds, self.record = holds, record
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._succeeded = True
        self._valid = {path.absolute(): True for path in verified}
        self._reports: queue.SimpleQueue[SaveReport] = queue.SimpleQueue()
        if exchange.rank == 0:
            remove_leftovers(self.folder)

    def save(
        self,
        step: int,
        state: StateReader,
        parameters: Mapping[str, ParameterInfo],
        *,
        extra: Mapping[str, Any],
        keep: bool = False,
        required: bool = False,
    ) -> None:
        """Copy the state, the generators and `extra` (plain JSON values, rank 0's count), and write them.

        `parameters` carry their current step counts. While the save before is still being written this one is
        skipped, unless it is `required` or to be kept for good (`keep`): then that one is waited for.
        """
        start = time.perf_counter()
        if not self._ready(wait=required or keep):
            self._finish(SaveReport(step=step, error="the save before it is still being written"))
            return
        rank = self.exchange.rank
        attempt = self.exchange.all_reduce_sum(secrets.randbits(62) if rank == 0 else 0)
        pieces = state.slices()
        everyone = holdings(pieces, parameters, self.exchange)
        content = {"step": step, "parameters": {name: asdict(info) for name, info in parameters.items()}}
        job = SaveJob(
            folder=self.folder,
            attempt=attempt,
            rank=rank,
            world_size=self.exchange.world_size,
            step=step,
            keep=keep,
            identity=self.identity,
            state=json.dumps(content | {"extra": extra}).encode(),
            generators=json.dumps(capture_generators()).encode(),
            file=PieceFile(pieces_to_write(pieces, everyone, rank)),
            names=list(parameters),
            patience=self.patience,
        )
        try:
            values = self._snapshot.take(state, job.file)
        except (MemoryError, RuntimeError) as error:
            self._fail(job, error)
            return
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(job, values, start), name="save", daemon=True)
            self._thread.start()
        else:
            self._run(job, values, start)

    def reports(self) -> list[SaveReport]:
        """The saves that ended since the last call, without waiting."""
        ended = []
        while not self._reports.empty():
            ended.append(self._reports.get())
        return ended

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the save under way, `timeout` seconds at most (default: twice `patience`).

        Returns, on every rank, whether the last save succeeded. All ranks call it together.
        """
        ended = self._join_together(timeout)
        return self.exchange.all_reduce_sum(int(not (ended and self._succeeded))) == 0

    def close(self, timeout: float | None = None) -> bool:
        """Wait for this rank's part of the save under way, `timeout` seconds at most (default: twice `patience`).

        Returns whether it ended. For the end of a run: after a failure the other ranks may be dead, and waiting for
        their parts would only keep this one from ending.
        """
        if self._thread is None:
            return True
        self._thread.join(2 * self.patience if timeout is None else timeout)
        return not self._thread.is_alive()

    def _ready(self, *, wait: bool) -> bool:
        """Whether no rank is writing any more."""
        if wait:
            self._join_together(None)
        writing = self._thread is not None and self._thread.is_alive()
        return self.exchange.all_reduce_sum(int(writing)) == 0

    def _join_together(self, timeout: float | None) -> bool:
        """Wait until no rank writes; whether this one's part ended in time.

        Ranks tell each other again and again that they wait: where one died, this fails at once, while the files of
        the dead would be waited for in vain.
        """
        end = time.monotonic() + (2 * self.patience if timeout is None else timeout)
        while True:
            ended = self.close(TOGETHER)
            if self.exchange.all_reduce_sum(int(not ended and time.monotonic() < end)) == 0:
                return ended

    def _run(self, job: SaveJob, values: Tensor, start: float) -> None:
        """In the background: nothing may escape from here."""
        path = warning = None
        try:
            if job.rank == 0:
                self._check_hold()
                remove_leftovers(self.folder, besides=job.temporary)
            job.write_share(values)
            if job.rank == 0:
                self._check_hold()
                path = job.publish()
                warning = self._tidy(path)
        except Exception as error:
            self._fail(job, error)
        else:
            self._finish(SaveReport(step=job.step, path=path, seconds=time.perf_counter() - start, warning=warning))

    def _check_hold(self) -> None:
        if not self.holds():
            raise SaveError(f"{self.folder} belongs to another run now")

    def _fail(self, job: SaveJob, error: Exception) -> None:
        job.give_up(explain(error))
        self._finish(SaveReport(step=job.step, error=explain(error)))

    def _finish(self, report: SaveReport) -> None:
        self._succeeded = report.error is None
        self._reports.put(report)

    def _tidy(self, newest: Path) -> str | None:
        """Rank 0: delete what is no longer needed, note the newest one; what went wrong with that."""
        self._valid[newest] = True
        try:
            prune(self.folder, keep=self.keep, is_valid=self._is_valid)
        except OSError as error:
            return f"Older ones could not be deleted: {explain(error)}."
        try:
            if self.record is not None:
                write_json(self.record, {"newest": newest.name})
        except OSError as error:
            return f"{self.record} could not be written: {explain(error)}."
        return None

    def _is_valid(self, path: Path) -> bool:
        """Checked once by each process: a save must not read all older ones again."""
        if path not in self._valid:
            try:
                verify(path)
                self._valid[path] = True
            except Unusable:
                self._valid[path] = False
        return self._valid[path]
