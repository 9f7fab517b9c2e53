"""The runs of a comparison: equal costs, one that fails or is stopped, several at a time."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.studies.comparison.starting import slots
from tests.studies.comparison.fake_runs import comparison, summaries


def test_runs_have_equal_flops_and_equal_time(tmp_path: Path) -> None:
    assert comparison(tmp_path, seeds=1).run() == []
    ends = summaries(tmp_path)
    assert sorted(ends) == [
        "scratch/x0.5/seed-1", "scratch/x0.7/seed-1", "scratch/x1.4/seed-1", "scratch/x1/seed-1",
        "shallow_1/flops/seed-1", "shallow_2/flops/seed-1", "stack/flops/seed-1", "stack/time/seed-1",
    ]  # fmt: skip
    reference = ends["scratch/x1/seed-1"]
    assert ends["stack/flops/seed-1"]["steps"] == 100, "the recipe itself"
    for arm in ("stack", "shallow_1", "shallow_2"):
        assert ends[f"{arm}/flops/seed-1"]["flops"] == pytest.approx(reference["flops"], rel=0.02)
    assert ends["stack/time/seed-1"]["training_seconds"] == pytest.approx(reference["training_seconds"], rel=0.02)
    config = json.loads((tmp_path / "compare/stack/time/seed-1/config.json").read_text())
    steps = [stage["steps"] for stage in config["stages"]]
    assert [count / sum(steps) for count in steps] == pytest.approx([0.2, 0.3, 0.5], abs=0.01)
    assert config["operator"] == config["optimizer_state"] == "stack" and config["seed"] == 1


def test_a_failed_run_keeps_the_others_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "stack/flops/seed-2")
    folder = tmp_path / "compare"
    assert comparison(tmp_path).run() == ["stack/flops/seed-2"]
    assert len(summaries(tmp_path)) == 15
    assert (folder / "stack/flops/seed-2.failed").read_text() == "ended with code 1: error: the disk is full.\n"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/summary.json")}
    monkeypatch.delenv("FAKE_FAIL")
    assert comparison(tmp_path).run() == []
    assert not (folder / "stack/flops/seed-2.failed").exists()
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/summary.json")}.items()


@pytest.mark.parametrize(("code", "is_lost"), [("1", False), ("71", True), ("137", True), ("2", False)])
def test_a_lost_node_is_told_from_what_would_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, is_lost: bool
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "stack/flops/seed-1")
    monkeypatch.setenv("FAKE_CODE", code)
    begun = comparison(tmp_path, seeds=1)
    assert begun.run() == ["stack/flops/seed-1"]
    assert begun.lost == ({"stack/flops/seed-1"} if is_lost else set())


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_stop_reaches_the_runs_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setenv("FAKE_WAIT", "scratch/x1/seed-1")
    waiting = tmp_path / "compare/scratch/x1/seed-1/config.json"

    def stop() -> None:
        while not waiting.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunAgain, match="SIGTERM"):
        comparison(tmp_path, seeds=1, slots=slots(at_once, pinned=False)).run()
    assert not waiting.with_name("summary.json").exists() and not waiting.with_name("stop").exists()
    monkeypatch.delenv("FAKE_WAIT")
    assert comparison(tmp_path, seeds=1, arms=["scratch"]).run() == []


def test_several_runs_at_a_time_have_a_core_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core")
    assert comparison(tmp_path, seeds=1, slots=slots(2, pinned=True), log=lines.append).run() == []
    ends = summaries(tmp_path)
    assert {tuple(end["pinned"]) for end in ends.values()} == {(cores[0],), (cores[1],)}
    assert {end["threads"] for end in ends.values()} == {"1"}
    assert lines[1].startswith("4 arms (scratch, shallow_1, shallow_2, stack), 1 seed: 8 runs; about ")
    begun = [line for line in lines if ", 4 layers x" in line or " layers x" in line]
    assert sorted(line.split(":")[0] for line in begun) == [f"run {i} of 8" for i in range(1, 9)]
    assert sum("ended at loss" in line for line in lines) == 8
    with pytest.raises(UserError, match=r"parallel is 9999, and there are \d+ cores"):
        slots(9999, pinned=True)


def test_on_gpus_each_run_has_a_device_of_its_own(tmp_path: Path) -> None:
    assert comparison(tmp_path, seeds=1, slots=slots(2, pinned=True, gpus=["4", "7", "9"])).run() == []
    assert {end["device"] for end in summaries(tmp_path).values()} == {"4", "7"}
    assert [place.environment for place in slots(1, pinned=True, gpus=["4", "7"])] == [{}]
    with pytest.raises(UserError, match="parallel is 3, and there are 2 GPUs"):
        slots(3, pinned=True, gpus=["4", "7"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 1001}, "seeds is 1001; it must be 1 to 1,000"),
        ({"launch": []}, "launch names empty"),
        ({"launch": ["no such program"]}, "launch names 'no such program'"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        comparison(tmp_path, **fields)
    with pytest.raises(UserError, match="leaves no room below 2..32 for 2 seeds"):
        comparison(tmp_path, "--seed=4294967295")
    assert not any(tmp_path.iterdir())


def test_a_closed_terminal_stops_the_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WAIT", "scratch/x1/seed-1")
    waiting = tmp_path / "compare/scratch/x1/seed-1/config.json"

    def close() -> None:
        while not waiting.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGHUP)

    kept = signal.getsignal(signal.SIGHUP)
    threading.Thread(target=close, daemon=True).start()
    with pytest.raises(RunAgain, match="SIGHUP"):
        comparison(tmp_path, seeds=1).run()
    assert signal.getsignal(signal.SIGHUP) == kept
