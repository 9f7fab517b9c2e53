"""The GPU check's parent with stand-ins for its worker: order, limits, crashes, hangs, lost devices, resumption."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKER = """
import json, os, signal, subprocess, sys, time
print("begins", file=sys.stderr)
for line in sys.stdin:
    request = json.loads(line)
    name, answer = request["row"], {"row": request["row"], "pid": os.getpid(), "pending": request["pending"]}
    if name.startswith("peer") and "bad" not in request["without"]:
        print(json.dumps({"doing": "bad"}), flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "crash":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "orphan":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=sys.stderr)
        print("child", child.pid, file=sys.stderr, flush=True)
        os._exit(3)
    if name == "hang":
        time.sleep(60)
    if name == "error":
        answer["error"] = "ValueError: no"
    if name == "lost":
        answer |= {"error": "CUDA error: an illegal memory access", "lost": True}
    print(json.dumps(answer), flush=True)
    if name == "lost":
        sys.exit(1)
"""
Run = Callable[..., Any]


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import parent

    return parent


@pytest.fixture
def run(parent: Any, tmp_path: Path) -> Run:
    """Rows by their names, `name@part` where the part matters; returns (check, records by row)."""
    from benchmarks.gpu_check.catalogue import Row
    from benchmarks.gpu_check.journal import Journal

    (tmp_path / "worker.py").write_text(WORKER)

    def start(*names: str, seconds: float = 60.0, **row: Any) -> Any:
        split = [name.split("@") for name in names]
        options = {"run": lambda at: {}, "seconds": row.get("estimate", 0.01), "needs": row.get("needs", ())}
        options["vital"] = row.get("vital", False)
        rows = [Row(name=name, part=(part or ["part"])[0], **options) for name, *part in split]
        journal = Journal(tmp_path / "journal.jsonl")
        check = parent.Check(
            journal=journal, command=[sys.executable, str(tmp_path / "worker.py")], log=tmp_path / "log",
            deadline=time.monotonic() + seconds, patience=row.get("patience", 1.0), show=lambda text: None,
        )  # fmt: skip
        check.run([found for found in rows if found.name not in journal.settled()])
        return check, journal.latest()

    return start


def test_rows_run_in_order_in_one_process_per_part(run: Run, tmp_path: Path) -> None:
    check, records = run("a", "b", "c@other")
    assert list(records) == ["a", "b", "c"] and check.left_out == []
    assert records["a"]["pid"] == records["b"]["pid"] != records["c"]["pid"]
    assert records["a"]["pending"] == ["b", "c"]
    assert (tmp_path / "log").read_text().count("begins") == 2


def test_crashes_errors_and_a_lost_device_cost_one_row(run: Run) -> None:
    _, records = run("a", "crash", "b", "error", "c", "lost", "d")
    assert [name for name, record in records.items() if "error" in record] == ["crash", "error", "lost"]
    assert "ended with 3" in records["crash"]["error"] and "last words" in records["crash"]["error"]
    pids = [records[name]["pid"] for name in "abcd"]
    assert pids[0] != pids[1] == pids[2] != pids[3]  # a new process where the old one was lost, else not


def test_a_hang_costs_one_row(run: Run) -> None:
    begin = time.monotonic()
    _, records = run("a", "hang", "b", patience=0.02)
    assert "no answer within" in records["hang"]["error"] and "error" not in records["b"]
    assert time.monotonic() - begin < 20


def test_what_a_dead_worker_has_started_ends_too(run: Run, tmp_path: Path) -> None:
    _, records = run("orphan", "b")
    assert "ended with 3" in records["orphan"]["error"] and "error" not in records["b"]
    child = int((tmp_path / "log").read_text().split("child ")[1].split()[0])
    for _ in range(100):  # until the killed child is reaped
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def test_a_worker_that_cannot_be_ended_does_not_hold_the_parent(parent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    def wait(timeout: float | None = None) -> None:
        waits.append(timeout)
        raise subprocess.TimeoutExpired("worker", timeout or 0)

    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, signal: killed.append(group))
    worker = parent.Worker.__new__(parent.Worker)
    worker.process = types.SimpleNamespace(pid=7, poll=lambda: None, wait=wait)
    worker.kill()
    assert killed == [7] and len(waits) == 1 and waits[0] is not None


def test_a_peer_that_ends_the_process_is_left_out(run: Run, tmp_path: Path) -> None:
    _, records = run("peer of a", "b")
    assert "error" not in records["peer of a"]
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 3 and '"at": "bad"' in lines[0] and "ended with -11" in lines[0]


def test_no_row_begins_that_does_not_fit(run: Run) -> None:
    check, records = run("a", "b", seconds=20.0, estimate=30.0)
    assert check.left_out == ["a", "b"] and records == {}


def test_estimates_follow_what_was_measured(run: Run, parent: Any) -> None:
    check, _ = run("a", seconds=100.0, estimate=20.0)
    from benchmarks.gpu_check.catalogue import Row

    later = Row(name="later", part="part", run=lambda at: {}, seconds=20.0)
    assert check.estimate(later) - parent.START < 8  # 20 s were estimated, under a second measured


def test_what_is_missing_is_skipped_with_a_reason(run: Run) -> None:
    _, records = run("a", needs=("json", "no_such_module"))
    assert records["a"]["skipped"] == "no_such_module absent"


def test_without_a_device_nothing_else_is_tried(run: Run) -> None:
    check, records = run("error", "a", "b", vital=True)
    assert set(records) == {"error"} and check.left_out == ["a", "b"]


def test_resumption_runs_what_is_left_and_failures_once_more(run: Run, tmp_path: Path) -> None:
    run("a", "error", "crash")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"row": "b", "tor')  # cut short by a crash
    first = (tmp_path / "journal.jsonl").read_text().count("\n")
    _, records = run("a", "error", "crash", "b")
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert first == 3 and len(lines) == 7 and set(records) == {"a", "error", "crash", "b"}
    run("a", "error", "crash", "b")
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 7  # nothing a third time


def test_a_resumed_session_runs_no_finished_row_again(
    parent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program itself: only what has no result, with the rows that say what the machine is; a new one runs all."""
    import argparse

    from benchmarks.gpu_check import __main__ as program
    from benchmarks.gpu_check.catalogue import Row

    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(program, "worker_command", lambda dry: [sys.executable, str(tmp_path / "worker.py")])
    shared = {"part": "part", "run": lambda at: {}, "seconds": 0.01}
    rows = [Row(name=name, always=name == "machine", **shared) for name in ("machine", "a", "error", "b")]

    def run(chosen: list[Any], folder: str, resume: Path | None) -> list[str]:
        """Names of the rows that ran, in order, as printed."""
        resumed = None if resume is None else str(resume)
        options = argparse.Namespace(session=True, resume=resumed, dry=False, minutes=5.0)
        program.run(chosen, tmp_path / folder, options)
        return [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" s)")]

    assert run(rows[:3], "first", None) == ["machine", "a", "error"]
    assert run(rows, "second", tmp_path / "first") == ["machine", "error", "b"]
    assert run(rows, "second", tmp_path / "second") == []  # failed twice, all else is there: the machine is no matter
    assert run(rows, "second", None) == ["machine", "a", "error", "b"]


def test_earlier_results_are_taken_over_and_old_ones_kept(parent: Any, tmp_path: Path) -> None:
    from benchmarks.gpu_check.journal import Journal

    earlier = tmp_path / "earlier"
    Journal(earlier / "session.jsonl").append({"row": "a"})
    (earlier / "comparison.tar.gz").write_bytes(b"x")
    journal = Journal(tmp_path / "out" / "session.jsonl")
    journal.path.parent.mkdir()
    journal.begin(earlier)
    assert journal.settled() == {"a"} and (tmp_path / "out" / "comparison.tar.gz").exists()
    journal.begin(None)
    assert journal.read() == [] and len(list((tmp_path / "out").glob("session-*.jsonl"))) == 1
    for half in ({"row": "b", "skipped": "x"}, {"row": "c", "unfinished": True}, {"row": "d", "error": "x"}):
        journal.append(half)
    assert journal.settled() == set()
