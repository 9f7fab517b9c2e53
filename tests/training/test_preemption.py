"""Asked to stop: who looks for it and how often, when all ranks know, and what a second signal means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunAgain
from ds_stacking.training.preemption import LOOK, SIGNALS, StopRequest
from ds_stacking.training.run_directory import remove_stop_files
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
CODE = """
import os, signal, sys, time
from pathlib import Path
from ds_stacking.training import preemption
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the tests may have been started to ignore
number, later, before = int(sys.argv[1]), float(sys.argv[2]), sys.argv[4]
clock = [1000.0]
stop = preemption.StopRequest(Path(sys.argv[3]), now=lambda: clock[0])
assert not stop.asked()
if before == "file":
    (Path(sys.argv[3]) / "stop").touch()
    clock[0] += preemption.LOOK
    assert stop.asked()
elif before:
    os.kill(os.getpid(), int(before))
os.kill(os.getpid(), number)
assert stop.asked()
clock[0] += later
if not before:
    os.kill(os.getpid(), number)
print(stop.reason)
"""


@pytest.mark.parametrize(
    ("number", "later", "code"),
    [
        (signal.SIGINT, 1, 0),
        (signal.SIGINT, 3, 130),
        (signal.SIGTERM, 10, 0),
        (signal.SIGTERM, 20, 143),
        (signal.SIGUSR1, 20, 138),
        (signal.SIGHUP, 20, 129),
    ],
)
def test_a_second_signal(tmp_path: Path, number: signal.Signals, later: float, code: int) -> None:
    """The second one comes `later` seconds after the first."""
    command = [sys.executable, "-c", CODE, str(int(number)), str(later), str(tmp_path), ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == ("" if code else number.name)


@pytest.mark.parametrize(("before", "reason"), [("file", "the stop file"), (str(int(signal.SIGUSR1)), "SIGUSR1")])
def test_a_first_signal_after_another_request_ends_nothing(tmp_path: Path, before: str, reason: str) -> None:
    """The batch script's stop file or USR1, then SIGTERM at the time limit, while the run saves."""
    command = [sys.executable, "-c", CODE, str(int(signal.SIGTERM)), "60", str(tmp_path), before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and reason in done.stdout, done.stderr


@pytest.fixture
def handlers() -> object:
    """A StopRequest takes the signals of its process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_one_rank_of_a_node_looks_and_not_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [1000.0], []
    exists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: (looks.append(path), exists(path))[1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = StopRequest(tmp_path, now=lambda: now[0])
    monkeypatch.setenv("LOCAL_RANK", "0")
    first = StopRequest(tmp_path, now=lambda: now[0])
    for _ in range(100):
        assert not first.asked() and not second.asked()
        now[0] += 0.99 * LOOK / 100
    assert len(looks) == 1
    (tmp_path / "stop").touch()
    now[0] += LOOK
    assert first.asked() and not second.asked()
    assert first.reason == f"the stop file {tmp_path / 'stop'}"


@pytest.mark.usefixtures("handlers")
def test_a_job_has_a_stop_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was refused must not stop, by being cancelled, the one that has the directory."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "stop-8").touch()
    assert not StopRequest(tmp_path).asked()
    (tmp_path / "stop-7").touch()
    assert StopRequest(tmp_path).asked()
    remove_stop_files(tmp_path)
    assert not StopRequest(tmp_path).asked(), "a new start removes what it finds"


def stopped(folder: str, rank_asked: int) -> str:
    """A run in which one rank is asked to stop after step 5; what ended it."""
    from ds_stacking.training.run import pretrain

    def prepare(run: Any) -> None:
        report = run.report

        def asked() -> None:
            if (run.state.position.step, int(os.environ["RANK"])) == (5, rank_asked):
                run.stop.request.reason = "the test"
            report()

        run.report = asked

    options = ["--stages=2:30", "--eval_every=0", "--checkpoint_every=0", "--tracking=none"]
    with pytest.raises(RunAgain) as error:
        pretrain(parse_run([*small_options(Path(folder)), *options]), on_built=prepare)
    return str(error.value)


@pytest.mark.distributed
def test_what_one_rank_was_asked_all_know_two_steps_later(tmp_path: Path) -> None:
    """The next step adds it up, and the one after that reads the sum."""
    write_corpus(tmp_path / "corpus")
    first, second = run_ranks(2, stopped, str(tmp_path), 1)
    assert "by another rank at step 7, saved" in first and "by the test at step 7, saved" in second
