"""Faults for runs: where they strike, what they do, and ranks that may die of them."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_stacking.common.failures import LOST
from tests import ranks
from tests.corpus import small_options

Fault = Callable[[int], None]
"""Called on every rank at the point with the rank's number."""


def train(folder: str, output: str, options: tuple[str, ...] = (), point: str = "", fault: str = "") -> str:
    """Train `folder`/`output` with a fault, resumed where there is a checkpoint; how it ended on this rank."""
    from ds_stacking.command_line import parse_run
    from ds_stacking.common.errors import RunAgain
    from ds_stacking.training.run import pretrain

    if point:
        strike(point, FAULTS[fault], Path(folder) / output)
    arguments = [
        *small_options(Path(folder)),
        f"--output_dir={folder}/{output}",
        *("--stages=1:8,2:8", "--log_every=2", "--eval_every=5", "--eval_sequences=8", "--checkpoint_every=3"),
        *("--tracking=none", "--resume=auto"),
        *options,
    ]
    try:
        pretrain(parse_run(arguments))
    except RunAgain:
        return "run again"
    return "finished"


def strike(point: str, fault: Fault, mark: Path) -> None:
    """Let `fault` strike once, at `point` and not before step 4; `mark` then exists."""
    from ds_stacking.checkpoint.job import SaveJob
    from ds_stacking.checkpoint.write import CheckpointWriter
    from ds_stacking.engine.stage_manager import StageManager
    from ds_stacking.training.loop import Pretraining

    when, what = point.split()
    place = {
        ("in", "step"): (Pretraining, "loss"),
        ("in", "evaluation"): (Pretraining, "poll"),
        ("in", "growth"): (StageManager, "_build"),
        ("in", "save"): (SaveJob, "_mark"),
    }.get((when, what))
    whole = {
        "step": (Pretraining, "train_step"),
        "evaluation": (Pretraining, "evaluate"),
        "growth": (Pretraining, "grow"),
        "save": (CheckpointWriter, "save"),
    }[what]
    owner, name = place or whole
    original, steps, done = getattr(owner, name), [0], []

    def here() -> None:
        if steps[0] >= 4 and not done:
            done.append(True)
            rank = int(os.environ["RANK"])
            mark.with_name(f"{mark.name}.{rank}").write_text(point)
            fault(rank)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if when != "after":
            here()
        result = original(*args, **kwargs)
        if when == "after":
            here()
        return result

    setattr(owner, name, struck)
    wrapped = Pretraining.train_step

    def counted(self: Pretraining, batches: list) -> None:
        wrapped(self, batches)
        steps[0] = self.position.step

    Pretraining.train_step = counted


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_all(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def full_disk(rank: int) -> None:
    if rank == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hang(rank: int) -> None:
    if rank == 1:
        time.sleep(1000)


FAULTS: dict[str, Fault] = {
    "SIGKILL of rank 1": kill_rank_1,
    "SIGKILL of all": kill_all,
    "SIGTERM to rank 1": terminate_rank_1,
    "full disk": full_disk,
    "hang": hang,
}


class Ranks:
    """Two ranks that run `train`; they may be killed."""

    def __init__(self, *arguments: Any) -> None:
        self.results = ranks._context.Queue()
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.processes = [
            ranks._context.Process(
                target=ranks._rank, args=(rank, 2, store, train, arguments, self.results), daemon=True
            )
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120, after_a_death: float = 20) -> list[str]:
        """How each rank ended: "finished", "run again", "failed" or "killed"; a hanging one is an error."""
        end = time.monotonic() + seconds
        ended: dict[int, str] = {}
        try:
            while len(ended) < 2:
                while not self.results.empty():
                    rank, value, error = self.results.get()
                    ended[rank] = value if error is None else "failed"
                for rank, process in enumerate(self.processes):
                    if rank not in ended and process.exitcode in (-signal.SIGKILL, -signal.SIGABRT):
                        ended[rank] = "killed"
                        end = min(end, time.monotonic() + after_a_death)
                    if rank not in ended and process.exitcode in (1, LOST):
                        ended[rank] = "failed"  # the alarm ends a process at once
                assert time.monotonic() < end, f"a rank did not end; the others: {ended}"
                time.sleep(0.02)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            self.folder.cleanup()
        return [ended[rank] for rank in range(2)]
