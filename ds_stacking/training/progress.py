"""What a person sees of a run: the resolved configuration, a progress bar per stage, events, the closing table.

A terminal gets a live bar; a log file (SLURM, a pipe) gets a plain line now and then. Only rank 0 has
one that shows anything, so the loop asks no questions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TextIO, cast

import rich.console
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ds_stacking.reports.closing import CLOSING, verdict
from ds_stacking.reports.table import count, duration, loss, stage_table


class Console:
    """What a run needs of a console. This one shows nothing: it is that of every rank but 0."""

    def resolved(self, settings: Mapping[str, object]) -> None:
        """Show the resolved configuration."""

    def log(self, text: str) -> None:
        """Show an event."""

    def start_stage(self, *, stage: int, stages: int, layers: int, steps: int, done: int = 0) -> None:
        """Begin a stage (0-based) of `steps` optimizer steps, `done` of which an earlier process made."""

    def update(self, done: int, record: Mapping[str, Any]) -> None:
        """Show figures of a training record, now that `done` steps of the stage are made."""

    def closing(self, summary: Mapping[str, Any]) -> None:
        """Show the table of stages and the closing figures."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class _Lenient:
    """A stream whose reader may go away (a closed terminal, a `tee` that was killed): the run goes on, in silence."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RichConsole(Console):
    """Writes to `stream`; `every` is the number of seconds between two plain lines where it is no terminal."""

    def __init__(
        self, stream: TextIO | None = None, *, every: float = 10.0, now: Callable[[], float] = time.perf_counter
    ) -> None:
        stream = cast(TextIO, _Lenient(stream or sys.stdout))
        self.live = stream.isatty()
        self.every, self.now = every, now
        # A log file has no width of its own; rich would fold tables at 80 columns there.
        self.out = rich.console.Console(
            file=stream, force_terminal=self.live, width=None if self.live else 119, markup=False, highlight=False
        )
        self._bar: Progress | None = None

    def resolved(self, settings: Mapping[str, object]) -> None:
        table = Table(box=box.SIMPLE_HEAD, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for title, value in settings.items():
            table.add_row(title, str(value))
        self.out.print(table)

    def log(self, text: str) -> None:
        self.out.print(text, soft_wrap=not self.live)

    def start_stage(self, *, stage: int, stages: int, layers: int, steps: int, done: int = 0) -> None:
        self.close()
        self._name = f"stage {stage + 1}/{stages}, {layers} layers"
        self._steps, self._first = steps, done
        self._start = self.now()
        self._next_line = self._start
        if self.live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.out,
            )
            self._task: TaskID = self._bar.add_task(self._name, total=steps, completed=done, figures="")
            self._bar.start()

    def update(self, done: int, record: Mapping[str, Any]) -> None:
        left = duration((self.now() - self._start) / max(done - self._first, 1) * (self._steps - done))
        share = f"  MFU {record['mfu']:.0%}" if "mfu" in record else ""
        figures = f"loss {record['loss']:.3f}  lr {record['lr']:.2e}  {count(record['tokens_per_second'])} tokens/s"
        figures += f"{share}  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
        elif self.now() >= self._next_line or done == self._steps:
            self._next_line = self.now() + self.every
            self.log(f"{self._name}  step {done}/{self._steps}  {figures}")

    def closing(self, summary: Mapping[str, Any]) -> None:
        self.close()
        self.out.print(stage_table(summary["stages"]))
        for name, meaning in CLOSING:
            self.log(f"{loss(summary.get(name)):>8}  {meaning}")
        if words := verdict(summary):
            self.log(words)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_console(rank: int) -> Console:
    """The console of a rank: a real one on rank 0 only."""
    return RichConsole() if rank == 0 else Console()


def growth_later_line(growth: Mapping[str, Any], steps: int) -> str:
    """One sentence for a growth of the summary, `steps` optimizer steps after it."""
    return (
        f"{steps} steps after the growth {growth['from_layers']} -> {growth['to_layers']}: held-out loss "
        f"{loss(growth['eval_loss_later'])}"
    )


def growth_line(record: Mapping[str, Any]) -> str:
    """One sentence for a growth record of metrics.jsonl."""
    return (
        f"growth {record['from_layers']} -> {record['to_layers']} layers ({record['operator']}, optimizer state "
        f"{record['optimizer_state']}) in {duration(record['seconds_growth'])}; held-out loss "
        f"{loss(record['eval_loss_before'])} -> {loss(record['eval_loss_after'])}; "
        f"{record['tensors_verified']} tensors verified"
    )
