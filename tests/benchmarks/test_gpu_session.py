"""`make gpu-session` on a CPU: rows of every part, and that it goes on where an earlier session ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def session(out: Path, work: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Its records by row, and what it printed."""
    command = ["make", "gpu-session", "DRY=1", "MINUTES=30", f"PYTHON={sys.executable}", *arguments]
    environment = {**os.environ, "OUT": str(out), "WORK": str(work)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    records = map(json.loads, (out / "session.jsonl").read_text().splitlines())
    return {record["row"]: record for record in records}, done.stdout


@pytest.mark.slow
def test_a_session_and_one_that_goes_on(tmp_path: Path) -> None:
    few = "--only 'correct: bias_gelu N=3072' 'model: base S=128' 'growth: ZeRO 3'"
    first, printed = session(tmp_path / "first", tmp_path / "work", f"ARGS={few}")
    last = first["growth: ZeRO 3"]["growths"][-1]
    assert (last["from"], last["to"], last["exact"]) == (6, 12, True)
    assert {"ours", "ours compiled", "bare", "peer", "peer compiled"} == set(first["model: base S=128"]["contenders"])
    assert first["correct: bias_gelu N=3072"]["ok"] and "correct: 1 of 1" in printed
    more = f"ARGS={few} 'growth: ZeRO 2' 'resume: ZeRO 2'"
    second, printed = session(tmp_path / "second", tmp_path / "work", more, f"SESSION={tmp_path / 'first'}")
    for name in ("growth: ZeRO 3", "model: base S=128", "correct: bias_gelu N=3072"):
        assert second[name] == first[name]  # taken over, not run again
        assert f"{name}: done" not in printed
    assert second["resume: ZeRO 2"]["same_bits"] and second["resume: ZeRO 2"]["killed_after"] < 20
    assert all(growth["exact"] for growth in second["growth: ZeRO 2"]["growths"])


def test_a_growth_that_is_not_the_written_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import torch

    from benchmarks.gpu_check.training import same, stacked

    before = {f"blocks.{i}.w master": torch.full((2,), float(i)) for i in range(3)}
    before |= {"word master": torch.ones(3), "blocks.0.w step": 7, "blocks.1.w step": 7, "blocks.2.w step": 7}
    grown = stacked(before, 3, 6)
    assert len(grown) == 13 and same(grown, dict(grown))
    assert [float(grown[f"blocks.{i}.w master"][0]) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    interleaved = {**grown, "blocks.3.w master": torch.full((2,), 1.0)}
    assert not same(grown, interleaved) and not same(grown, {**grown, "blocks.5.w step": 8})
    assert not same(grown, {name: value for name, value in grown.items() if name != "word master"})


def test_finished_runs_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import tarfile

    from benchmarks.gpu_check.training import pack

    folder = tmp_path / "comparison"
    ended = [f"scratch/x1/seed-1/{name}.json" for name in ("summary", "config", "checkpoints/model")]
    for name in ("comparison.json", *ended, "stack/flops/seed-1/config.json", "pilot/summary.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    pack(folder, tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as tar:
        names = sorted(tar.getnames())
    assert names == [
        "comparison/comparison.json", "comparison/pilot/summary.json", "comparison/scratch/x1/seed-1/config.json",
        "comparison/scratch/x1/seed-1/summary.json",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", [subprocess.TimeoutExpired("compare.py", 1), OSError("no")])
def test_the_comparison_is_packed_however_it_ends(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it cannot even be killed."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import training
    from benchmarks.gpu_check.catalogue import machine

    class Stuck:
        def __init__(self, *_: Any, **__: Any) -> None:
            (tmp_path / "work" / "comparison").mkdir()
            (tmp_path / "work" / "comparison" / "comparison.json").write_text("{}")

        def wait(self, timeout: float) -> int:
            raise fault

        def send_signal(self, number: int) -> None: ...

        kill = close = lambda self: None

    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(training.subprocess, "Popen", Stuck)
    monkeypatch.setattr(training, "report_of", lambda command: "so far")
    if isinstance(fault, subprocess.TimeoutExpired):
        assert training.compare_depths(machine(dry=True))["state"] == "cut short"
    else:
        with pytest.raises(OSError):
            training.compare_depths(machine(dry=True))
    assert (tmp_path / training.TARBALL).exists()


def test_limits_within_rows_end_before_the_rows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import facts, training

    (row,) = (row for row in facts.first() if row.name == "compilation")
    assert row.limit > facts.COMPILATION_SECONDS
    assert training.STOPPING > training.TO_STOP + training.TO_KILL + training.TO_REPORT


def test_runs_that_are_compared_to_the_bit_do_not_measure_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check.training import _options
    from ds_stacking.command_line import parse_run

    assert parse_run(_options(2, tmp_path, False)).tiles == "predict"
