"""One run directory, one writer: who is refused, who is dead, who wins a race, who ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import UserError
from ds_stacking.growth.exchange import OneRank
from ds_stacking.training import ownership
from ds_stacking.training.ownership import OWNERS, Owner, Process, newest
from tests.checkpoint.stores import PARAMETERS, random_state

forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Heartbeats as fast as a test wants them; a start leaves the umask private."""
    monkeypatch.setattr(ownership, "BEAT", 0.1)
    monkeypatch.setattr(ownership, "SILENCE", 1.5)
    old = os.umask(0o077)
    yield
    os.umask(old)


def hold(run_dir: Path, elsewhere: bool, ready: Any) -> None:
    """A process that owns the directory until it is killed, on another machine where `elsewhere`."""
    if elsewhere:
        here = ownership.machine()
        ownership.machine = lambda: f"another than {here}"
    Owner(run_dir)
    ready.set()
    time.sleep(600)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts another process that owns tmp_path/run."""
    started = []

    def start(*, elsewhere: bool = False) -> Any:
        ready = forked.Event()
        process = forked.Process(target=hold, args=(tmp_path / "run", elsewhere, ready), daemon=True)
        process.start()
        started.append(process)
        assert ready.wait(20)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def takes(run_dir: Path) -> bool:
    """Whether a start can have the directory now."""
    try:
        Owner(run_dir).release()
    except UserError as error:
        assert "is in use by process" in str(error) and "choose another --output_dir" in str(error)
        return False
    return True


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_living_owner_stays(tmp_path: Path, owner: Callable[..., Any], elsewhere: bool) -> None:
    owner(elsewhere=elsewhere)
    before = newest(tmp_path / "run" / OWNERS)
    assert not takes(tmp_path / "run") and not takes(tmp_path / "run")
    assert newest(tmp_path / "run" / OWNERS) == before == 1


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_on_this_machine_is_dead_at_once(
    tmp_path: Path, owner: Callable[..., Any], reaped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SILENCE", 1000.0)
    process = owner()
    os.kill(process.pid, signal.SIGKILL)
    if reaped:
        process.join()
    else:
        time.sleep(0.2)
    assert takes(tmp_path / "run")


def test_an_owner_on_another_machine_is_dead_when_its_heartbeat_stands_still(
    tmp_path: Path, owner: Callable[..., Any]
) -> None:
    owner(elsewhere=True).kill()
    said: list[str] = []
    start = time.monotonic()
    Owner(tmp_path / "run", said.append).release()
    assert time.monotonic() - start > ownership.SILENCE
    assert len(said) == 1 and "whether process" in said[0]


def test_a_process_with_the_number_of_a_dead_one_is_another(tmp_path: Path) -> None:
    me = Process.this()
    assert me.sees_alive(me)
    assert me.sees_alive(replace(me, started="1")) is False
    assert me.sees_alive(replace(me, machine="elsewhere")) is None


def test_a_requeued_job_succeeds_itself_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = replace(Process.this(), machine="the node that died")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = Process.this()
    assert again.sees_alive(first) is False and first.sees_alive(again) is None
    assert again.sees_alive(replace(first, job=":8")) is None
    assert "of SLURM job 7 on" in str(again)


@pytest.mark.parametrize("content", [b"", b'{"host": "a'])
def test_half_a_claim_is_dead_when_nobody_finishes_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OWNERS).mkdir()
    (tmp_path / OWNERS / "4").write_bytes(content)
    taken = Owner(tmp_path)
    assert taken.number == 5 and taken.holds
    taken.release()


def compete(run_dir: Path, together: Any, results: Any, over: Any) -> None:
    together.wait()
    try:
        Owner(run_dir)
        results.put(True)
    except UserError:
        results.put(False)
    over.wait()
    os._exit(0)


@pytest.mark.parametrize("before", ["nothing", "a dead owner", "an owner that gave up"])
def test_of_several_starts_exactly_one_wins(tmp_path: Path, before: str) -> None:
    for number in range(15):
        run_dir = tmp_path / str(number)
        if before != "nothing":
            Owner(run_dir).release()
            (run_dir / OWNERS).mkdir(parents=True)
            dead = json.dumps(asdict(replace(Process.this(), started="1")))
            state = ownership.RELEASED if before == "an owner that gave up" else "0"
            (run_dir / OWNERS / "3").write_text(f"{dead}\n{state:>20}\n")
        together, results, over = forked.Barrier(6), forked.Queue(), forked.Event()
        starts = [forked.Process(target=compete, args=(run_dir, together, results, over)) for _ in range(6)]
        for process in starts:
            process.start()
        won = [results.get(timeout=30) for _ in starts]
        over.set()
        for process in starts:
            process.join()
        assert sum(won) == 1, won


def test_a_listing_that_is_out_of_date_deceives_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems show a new file by its name before they show it in its directory."""
    owner = Owner(tmp_path)
    monkeypatch.setattr(ownership, "newest", lambda folder: 0)
    time.sleep(3 * ownership.BEAT)
    assert owner.holds
    assert not takes(tmp_path)
    owner.release()


def test_an_owner_that_slept_too_long_ends(
    tmp_path: Path, owner: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    process = owner(elsewhere=True)
    os.kill(process.pid, signal.SIGSTOP)
    successor = Owner(tmp_path / "run")
    os.kill(process.pid, signal.SIGCONT)
    process.join(10)
    assert process.exitcode == 1
    assert "is no longer this run's (taken over, moved or deleted)" in capfd.readouterr().err
    assert successor.holds
    successor.release()
    assert not successor.holds


@pytest.mark.parametrize("away", ["moved", "deleted"])
def test_an_owner_whose_directory_went_away_ends_and_publishes_nothing(
    tmp_path: Path, owner: Callable[..., Any], away: str
) -> None:
    process = owner(elsewhere=False)
    if away == "moved":
        (tmp_path / "run").rename(tmp_path / "archive")
    else:
        shutil.rmtree(tmp_path / "run")
    successor = Owner(tmp_path / "run")
    process.join(10)
    assert process.exitcode == 1 and successor.holds
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert not successor.holds
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert successor.holds
    successor.release()


def test_a_refused_start_leaves_no_folder_and_never_one_with_something_in_it(tmp_path: Path) -> None:
    Owner(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()
    used = Owner(tmp_path / "used")
    (tmp_path / "used" / "config.json").touch()
    used.release()
    assert (tmp_path / "used" / "config.json").exists()
    assert takes(tmp_path / "used") and (tmp_path / "used").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / OWNERS).touch()
    with pytest.raises(UserError, match="cannot be written .*choose another --output_dir"):
        Owner(tmp_path)


def test_what_was_lost_is_neither_swept_nor_published(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, OneRank(), identity={}, asynchronous=False, holds=lambda: False)
    other = tmp_path / ".tmp-step-9-of-another-run"
    other.mkdir()
    writer.save(1, random_state(1), PARAMETERS, extra={})
    (report,) = writer.reports()
    assert report.error and "belongs to another run now" in report.error
    assert list(tmp_path.iterdir()) == [other]
