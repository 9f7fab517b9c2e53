"""A run under the real deepspeed launcher is asked to stop in every way; it saves one step and leaves no process.

All cases go on with the same run, so each one also resumes what the one before saved.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.corpus import small_options, write_corpus

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
START = 200
"""Seconds in which a run must have begun and taken some steps, on a busy machine too."""
END = 30
"""Seconds from the request to the end of the last process."""
RUN_AGAIN = 75


class Launched:
    """A started run and its processes: the launcher's front, its inner process, the ranks."""

    def __init__(self, folder: Path, number: int) -> None:
        self.run_dir, self.log = folder / "run", folder / f"{number}.log"
        options = [*small_options(folder), "--stages=2:1000000", "--eval_every=0", "--tracking=none", "--resume=auto"]
        command = ["deepspeed", "--num_gpus=2", f"--master_port={21000 + os.getpid() % 20000 + number}"]
        variables = {"LOCAL_SIZE": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        before = self.step()
        with self.log.open("w") as log:
            self.front = psutil.Popen(
                [*command, "launchers/pretrain.py", *options],
                cwd=ROOT,
                env=os.environ | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own, as a terminal gives a command
            )
        end = time.monotonic() + START
        while self.step() < before + 10:
            assert self.front.is_running() and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        (self.inner,) = self.front.children()
        self.ranks = {int(child.environ()["RANK"]): child for child in self.inner.children()}
        assert set(self.ranks) == {0, 1}

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            return json.loads((self.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def wait(self) -> int | None:
        """Wait for the end of every process; the front's exit code. Raises AssertionError where one lives on."""
        _, alive = psutil.wait_procs([self.front, self.inner, *self.ranks.values()], timeout=END)
        for process in alive:
            process.kill()
        assert not alive, self.log.read_text()
        return self.front.returncode


def terminal(run: Launched) -> None:
    os.killpg(run.front.pid, signal.SIGINT)


REQUESTS: dict[str, tuple[Callable[[Launched], object], str, int | None]] = {
    "SIGUSR1 to rank 1": (lambda run: run.ranks[1].send_signal(signal.SIGUSR1), "another rank", RUN_AGAIN),
    "SIGTERM to the inner launcher": (lambda run: run.inner.terminate(), "SIGTERM", 1),
    "Ctrl-C": (terminal, "SIGINT", None),
    "SIGTERM to the front": (lambda run: run.front.terminate(), "the end of the launcher", -signal.SIGTERM),
    "the inner launcher is killed": (lambda run: run.inner.kill(), "the end of the launcher", 0),
    "the stop file": (lambda run: (run.run_dir / "stop").touch(), "the stop file", RUN_AGAIN),
}
"""What is done; what rank 0 names as the reason; the front's exit code, which is DeepSpeed's (None: not defined)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    write_corpus(folder / "corpus")
    return folder


QUICK = ("SIGTERM to the front",)
"""That of make test; the others are make test-long."""


@pytest.mark.parametrize(
    "request_", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in REQUESTS]
)
def test_every_rank_saves_the_same_step_and_no_process_stays(folder: Path, request_: str) -> None:
    ask, reason, code = REQUESTS[request_]
    steps_before = {path.name for path in (folder / "run" / "checkpoints").glob("step-*")}
    run = Launched(folder, list(REQUESTS).index(request_))
    ask(run)
    ended = run.wait()
    said = run.log.read_text()
    match = re.search(r"stopped by (.*) at step (\d+), saved; go on with --resume auto", said)
    # rank 0 speaks, and each rank looks for itself: where another is the first to see it, that is what rank 0 knows
    assert match and (reason in match[1] or match[1] == "another rank"), said
    manifest = json.loads((folder / "run" / "checkpoints" / f"step-{match[2]}" / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and f"step-{match[2]}" not in steps_before
    assert run.step() == int(match[2]), "the metrics end with the step that was saved"
    if steps_before:
        newest = max(int(name.split("-")[1]) for name in steps_before)
        assert f"resumed at step {newest}, from" in said
    if code is not None:
        assert ended == code, said
    assert 'launchers/pretrain.py", line' not in said, "no rank has a traceback; DeepSpeed's launcher may"
