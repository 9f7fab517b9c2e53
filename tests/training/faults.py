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

    arguments = [
        *small_options(Path(folder)),
        f"--output_dir={folder}/{output}",
        *("--stages=1:8,2:8", "--log_every=2", "--eval_every=5", "--eval_sequences=8", "--checkpoint_every=3"),
        *("--tracking=none", "--resume=auto"),
        *options,
    ]
    try:
        pretrain(parse_run(arguments), on_built=lambda run: strike(run, point, fault) if point else None)
    except RunAgain:
        return "run again"
    return "finished"


def strike(run: Any, point: str, fault: str) -> None:
    """Let a fault strike once, at `point` and not before step 4; a file beside the run directory then exists."""
    from ds_stacking.checkpoint.job import SaveJob
    from ds_stacking.engine.factory import EngineFactory

    when, what = point.split()
    place = {
        ("in", "step"): (run, "loss"),
        ("in", "evaluation"): (run.evaluation, "poll"),
        ("in", "growth"): (EngineFactory, "build"),
        ("in", "save"): (SaveJob, "write_share"),
    }.get((when, what))
    whole = {
        "step": (run, "train_step"),
        "evaluation": (run.evaluation, "evaluate"),
        "growth": (run, "grow"),
        "save": (run.writer, "save"),
    }[what]
    owner, name = place or whole
    original, done = getattr(owner, name), []

    def here() -> None:
        if run.state.position.step >= 4 and not done:
            done.append(True)
            rank = int(os.environ["RANK"])
            run.run_dir.with_name(f"{run.run_dir.name}.{rank}").write_text(point)
            FAULTS[fault](rank)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if when != "after":
            here()
        result = original(*args, **kwargs)
        if when == "after":
            here()
        return result

    setattr(owner, name, struck)


def stop_at(step: int) -> Callable[[Any], None]:
    """For `on_built`: a run that is asked to stop, on its last rank, at a step, and knows it everywhere at once."""

    def prepare(run: Any) -> None:
        original = run.stop_if_asked

        def stop_if_asked() -> None:
            if run.state.position.step == step:
                run.stop.told = True
                if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                    run.stop.request.reason = "the test"
            original()

        run.stop_if_asked = stop_if_asked

    return prepare


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
        self.results = ranks.context.Queue()
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.processes = [
            ranks.context.Process(
                target=ranks.run_rank, args=(rank, 2, store, train, arguments, self.results), daemon=True
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
