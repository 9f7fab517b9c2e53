"""The pilot of a comparison: what a step costs, a recipe that it refuses, and one that was killed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.studies.comparison.pilot import PILOT_OPTIONS, is_pilot, read_costs
from tests.studies.comparison.fake_runs import FAKE, a_run, comparison


def test_costs_are_those_of_the_later_steps(tmp_path: Path) -> None:
    records, seconds = [], 0.0
    for step in range(1, 13):
        seconds += 60.0 if step < 4 else 2.0 if step != 8 else 30.0  # a slow start and one interruption
        records.append({"kind": "train", "layers": 2, "step": step, "flops": 7.0 * step, "cpu_seconds": seconds})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (cost,) = read_costs(tmp_path, "cpu_seconds").values()
    assert (cost.flops, cost.seconds) == (7.0, 2.0)


@pytest.mark.parametrize(
    "lines",
    ['{"kind": "train"}\n', "x\n", '{"kind": "train", "layers": 2, "step": 1, "flops": 1, "cpu_seconds": 1}\n'],
)
def test_a_pilot_that_does_not_tell_is_refused(tmp_path: Path, lines: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match="and the pilot is run again"):
        read_costs(tmp_path, "cpu_seconds")


def test_a_pilot_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the pilot ended with code 1: it said nothing"):
        comparison(tmp_path, launch=["false"]).run()
    assert comparison(tmp_path, seeds=1).plan()["runs"]


def test_bad_input_of_all_runs_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    with pytest.raises(UserError, match="^the disk is full.$"):
        comparison(tmp_path).run()
    assert not (tmp_path / "compare").exists(), "nothing is left of what was refused"
    monkeypatch.delenv("FAKE_FAIL")
    with pytest.raises(UserError, match="seeds is 0"):
        comparison(tmp_path, seeds=0)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_refused_recipe_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_there: bool) -> None:
    if was_there:
        (tmp_path / "compare").mkdir()
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    with pytest.raises(UserError, match="the disk is full"):
        comparison(tmp_path, "--lr=9").run()
    monkeypatch.delenv("FAKE_FAIL")
    assert not (tmp_path / "compare/comparison.json").exists()
    assert len(comparison(tmp_path, "--lr=1e-3", seeds=1).plan()["runs"]) == 8, (
        "the mended command works in the same folder"
    )
    with pytest.raises(UserError, match=r"of another recipe \(lr 0.001 -> 9.0\)"):
        comparison(tmp_path, "--lr=9").plan()


def test_what_others_put_beside_a_refused_pilot_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    notes = tmp_path / "compare/notes.txt"
    busy = ["sh", "-c", f'echo mine > {notes}; exec "$@"', "sh", sys.executable, str(FAKE)]
    with pytest.raises(UserError, match="the disk is full"):
        comparison(tmp_path, launch=busy).run()
    assert [path.name for path in (tmp_path / "compare").iterdir()] == ["notes.txt"]


def test_a_pilot_that_was_killed_begins_again(tmp_path: Path) -> None:
    a_run(tmp_path / "compare/pilot", **PILOT_OPTIONS)
    assert len(comparison(tmp_path, seeds=1).plan()["runs"]) == 8
    shutil.rmtree(tmp_path / "compare")
    (tmp_path / "compare/pilot/.owner").mkdir(parents=True)
    assert len(comparison(tmp_path, seeds=1).plan()["runs"]) == 8


def test_the_pilot_s_record_is_known_again(planned: Path) -> None:
    assert is_pilot(planned)
