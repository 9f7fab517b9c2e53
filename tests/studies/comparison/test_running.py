"""The comparison's runner: plan from a pilot, restart arm by arm, a failed run, a stop, one task of a job array."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunAgain, RunFailed, UserError
from ds_stacking.studies.comparison.running import PILOT_OPTIONS, Comparison, is_pilot, read_costs

FAKE = Path(__file__).with_name("fake_pretrain.py")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def project_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE.parents[3]))


def comparison(folder: Path, *more: str, **fields: Any) -> Comparison:
    options = ["--stages=1:20,2:30,4:50", *more]
    start = [sys.executable, str(FAKE)]
    fields = {"arms": ["scratch", "stack"], "seeds": 2, "say": lambda line: None, "launch": start} | fields
    config = parse_run([*options, f"--output_dir={folder / 'compare'}"])
    return Comparison(config=config, options=options, **fields)


def test_runs_have_equal_flops_and_equal_time(tmp_path: Path) -> None:
    assert comparison(tmp_path, seeds=1).run() == []
    summaries = {
        str(path.parent.relative_to(tmp_path / "compare")): json.loads(path.read_text())
        for path in (tmp_path / "compare").glob("*/*/*/summary.json")
    }
    assert sorted(summaries) == [
        "scratch/x0.7/seed-1", "scratch/x1.4/seed-1", "scratch/x1/seed-1", "stack/flops/seed-1", "stack/time/seed-1",
    ]  # fmt: skip
    reference = summaries["scratch/x1/seed-1"]
    assert summaries["stack/flops/seed-1"]["steps"] == 100, "the recipe itself"
    assert summaries["stack/flops/seed-1"]["flops"] == pytest.approx(reference["flops"], rel=0.01)
    assert summaries["stack/time/seed-1"]["training_seconds"] == pytest.approx(reference["training_seconds"], rel=0.02)
    config = json.loads((tmp_path / "compare/stack/time/seed-1/config.json").read_text())
    steps = [stage["steps"] for stage in config["stages"]]
    assert [count / sum(steps) for count in steps] == pytest.approx([0.2, 0.3, 0.5], abs=0.01)
    assert config["operator"] == config["optimizer_state"] == "stack" and config["seed"] == 1


def test_a_failed_run_keeps_the_others_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "stack/flops/seed-2")
    folder = tmp_path / "compare"
    assert comparison(tmp_path).run() == ["stack/flops/seed-2"]
    assert len(list(folder.glob("*/*/*/summary.json"))) == 9
    assert (folder / "stack/flops/seed-2.failed").read_text() == "ended with code 1: error: the disk is full.\n"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/summary.json")}
    monkeypatch.delenv("FAKE_FAIL")
    assert comparison(tmp_path).run() == []
    assert not (folder / "stack/flops/seed-2.failed").exists()
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/summary.json")}.items()


def test_a_stop_reaches_the_run_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WAIT", "scratch/x1/seed-1")
    waiting = tmp_path / "compare/scratch/x1/seed-1/config.json"

    def stop() -> None:
        while not waiting.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunAgain, match="SIGTERM"):
        comparison(tmp_path, seeds=1).run()
    assert not waiting.with_name("summary.json").exists() and not waiting.with_name("stop").exists()
    monkeypatch.delenv("FAKE_WAIT")
    assert comparison(tmp_path, seeds=1, arms=["scratch"]).run() == []


def test_a_task_is_one_arm_and_seed_and_more_can_be_added(tmp_path: Path) -> None:
    assert comparison(tmp_path).run(task=1) == []
    runs = {path.parent.name for path in (tmp_path / "compare").glob("*/*/*/summary.json")}
    arms = {path.parent.parent.parent.name for path in (tmp_path / "compare").glob("*/*/*/summary.json")}
    assert (arms, runs) == ({"scratch"}, {"seed-2"})
    with pytest.raises(UserError, match="task 4 is not among the 4 of 2 arms and 2 seeds"):
        comparison(tmp_path).run(task=4)
    comparison(tmp_path, arms=["scratch", "late"], seeds=3).plan()
    plan = json.loads((tmp_path / "compare/comparison.json").read_text())
    assert list(plan["arms"]) == ["scratch", "stack", "late"]
    assert len(plan["runs"]) == 3 * 3 + 2 * 2 + 3 * 2
    with pytest.raises(UserError, match="comparison of another recipe"):
        comparison(tmp_path, "--lr=1e-4").plan()


def test_bad_input_of_all_runs_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    with pytest.raises(UserError, match="^the disk is full.$"):
        comparison(tmp_path).run()
    assert not (tmp_path / "compare").exists(), "nothing is left of what was refused"
    monkeypatch.delenv("FAKE_FAIL")
    with pytest.raises(UserError, match="seeds is 0"):
        comparison(tmp_path, seeds=0)


def test_costs_are_those_of_the_later_steps(tmp_path: Path) -> None:
    records, seconds = [], 0.0
    for step in range(1, 13):
        seconds += 60.0 if step < 4 else 2.0 if step != 8 else 30.0  # a slow start and one interruption
        records.append({"kind": "train", "layers": 2, "step": step, "flops": 7.0 * step, "cpu_seconds": seconds})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (cost,) = read_costs(tmp_path, "cpu_seconds").values()
    assert (cost.flops, cost.seconds) == (7.0, 2.0)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_refused_recipe_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_there: bool) -> None:
    if was_there:
        (tmp_path / "compare").mkdir()
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    with pytest.raises(UserError, match="the disk is full"):
        comparison(tmp_path, "--lr=9").run()
    monkeypatch.delenv("FAKE_FAIL")
    assert not (tmp_path / "compare/comparison.json").exists()
    assert len(comparison(tmp_path, "--lr=1e-3", seeds=1).plan()) == 5, "the mended command works in the same folder"
    with pytest.raises(UserError, match=r"of another recipe \(lr 0.001, not 9.0\)"):
        comparison(tmp_path, "--lr=9").plan()


def test_a_pilot_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the pilot ended with code 1: it said nothing"):
        comparison(tmp_path, launch=["false"]).run()
    assert comparison(tmp_path, seeds=1).plan()


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
    with pytest.raises(UserError, match="leaves no room for 2 seeds"):
        comparison(tmp_path, "--seed=4294967295")
    assert not any(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compare").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        comparison(tmp_path)
    (tmp_path / "compare").unlink()
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run, and no comparison"):
        comparison(tmp_path)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison whose pilot has run."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKE.parents[3]))
        comparison(folder, seeds=1).plan()
    return folder / "compare"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "comparison.json is damaged or no such file: it is no JSON"),
        ({"costs": {}}, "has no cost of 1 layers"),
        ({"costs": {"a": {}}}, "costs.a"),
        ({"costs": {"1": {"flops": 0, "seconds": 1}}}, "costs.1.flops"),
        ({"recipe": "x"}, "recipe: input should be an object"),
        ({"recipe": {"a\n": 1}}, "comparison of another recipe"),
        ({"clock": "cpu"}, "of another recipe .clock 'cpu', not 'wall'"),
        ({"runs": {"a": "x"}}, "runs.a"),
    ],
)
def test_a_damaged_plan_is_named(planned: Path, tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    shutil.copytree(planned, tmp_path / "compare")
    path = tmp_path / "compare/comparison.json"
    path.write_text("[" * 100_000 if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        comparison(tmp_path, seeds=1).run()


@pytest.mark.parametrize("name", [".lock", "comparison.json", "scratch", "scratch/x0.7/seed-1.log"])
def test_links_in_a_comparison_are_not_followed(planned: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(planned, tmp_path / "compare")
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "compare" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link"):
        comparison(tmp_path, seeds=1).run()
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    "lines",
    ['{"kind": "train"}\n', "x\n", '{"kind": "train", "layers": 2, "step": 1, "flops": 1, "cpu_seconds": 1}\n'],
)
def test_a_pilot_that_does_not_tell_is_refused(tmp_path: Path, lines: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match="and the pilot is run again"):
        read_costs(tmp_path, "cpu_seconds")


def a_run(folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"data_fingerprint": "a", "versions": {}, "stages": [{"layers": 2, "steps": 60}], **options}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("months of work")
    return folder


@pytest.mark.parametrize("name", ["pilot", "scratch", "stack"])
def test_a_run_of_somebody_else_is_not_taken_for_the_comparison_s(tmp_path: Path, name: str) -> None:
    run = a_run(tmp_path / "compare" / name)
    with pytest.raises(UserError, match=rf"holds {name}/, and no comparison.json .*choose another --output_dir"):
        comparison(tmp_path)
    assert (run / "metrics.jsonl").read_text() == "months of work"
    assert [path.name for path in (tmp_path / "compare").iterdir()] == [name]


def test_a_pilot_that_was_killed_begins_again(tmp_path: Path) -> None:
    a_run(tmp_path / "compare/pilot", **PILOT_OPTIONS)
    assert len(comparison(tmp_path, seeds=1).plan()) == 5
    shutil.rmtree(tmp_path / "compare")
    (tmp_path / "compare/pilot/.owner").mkdir(parents=True)
    assert len(comparison(tmp_path, seeds=1).plan()) == 5


def test_the_pilot_s_record_is_known_again(planned: Path) -> None:
    assert is_pilot(planned)


def test_what_others_put_beside_a_refused_pilot_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    begun = comparison(tmp_path)
    start = begun._start

    def busy(*arguments: Any) -> tuple[int, str]:
        (tmp_path / "compare/notes.txt").write_text("mine")
        return start(*arguments)

    monkeypatch.setattr(begun, "_start", busy)
    with pytest.raises(UserError, match="the disk is full"):
        begun.run()
    assert [path.name for path in (tmp_path / "compare").iterdir()] == ["notes.txt"]


def test_places_that_are_no_comparison_s(tmp_path: Path) -> None:
    (tmp_path / "compare/.git").mkdir(parents=True)
    with pytest.raises(UserError, match="is a checkout of git"):
        comparison(tmp_path)
