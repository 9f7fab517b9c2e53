"""The comparison's runner: plan from a pilot, restart, tuned rates, runs at a time, one task of a job array."""

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
from filelock import FileLock

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunAgain, RunFailed, UserError
from ds_stacking.studies.comparison.pilot import PILOT_OPTIONS, is_pilot, read_costs
from ds_stacking.studies.comparison.running import Comparison
from ds_stacking.studies.comparison.starting import Place, places

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


def summaries(folder: Path) -> dict[str, Any]:
    found = (folder / "compare").glob("*/*/*/summary.json")
    return {str(path.parent.relative_to(folder / "compare")): json.loads(path.read_text()) for path in found}


def plan(folder: Path) -> Any:
    return json.loads((folder / "compare/comparison.json").read_text())


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


def test_the_plan_says_all_that_a_reader_must_know(tmp_path: Path) -> None:
    comparison(tmp_path, own=["slow=1:10,4:90"]).plan()
    saved = plan(tmp_path)
    assert saved["version"] == 2 and saved["data_fingerprint"] == "00c0ffee00c0ffee" and saved["clock"] == "wall"
    assert len(saved["commit"].removesuffix("-dirty")) == 40 and saved["versions"]["torch"]
    assert (saved["seeds"], saved["added_seeds"], saved["budgets"]) == ([1, 2], [], [0.5, 0.7, 1.0, 1.4])
    kinds = {name: (arm["kind"], arm["depths"], arm["baseline"], arm["lr"]) for name, arm in saved["arms"].items()}
    assert kinds == {
        "scratch": ("scratch", [4], None, 0.002),
        "shallow_1": ("shallow", [1], "scratch", 0.002),
        "shallow_2": ("shallow", [2], "scratch", 0.002),
        "stack": ("grown", [1, 2, 4], "scratch", 0.002),
        "slow": ("own", [1, 4], "scratch", 0.002),
    }
    assert saved["runs"]["stack/flops/seed-2"] == [[1, 20], [2, 30], [4, 50]]
    assert saved["tuning"] is None


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
        comparison(tmp_path, seeds=1, places=places(at_once, pinned=False)).run()
    assert not waiting.with_name("summary.json").exists() and not waiting.with_name("stop").exists()
    monkeypatch.delenv("FAKE_WAIT")
    assert comparison(tmp_path, seeds=1, arms=["scratch"]).run() == []


def test_several_runs_at_a_time_have_a_core_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core")
    assert comparison(tmp_path, seeds=1, places=places(2, pinned=True), say=lines.append).run() == []
    ends = summaries(tmp_path)
    assert {tuple(end["pinned"]) for end in ends.values()} == {(cores[0],), (cores[1],)}
    assert {end["threads"] for end in ends.values()} == {"1"}
    assert lines[1].startswith("4 arms (scratch, shallow_1, shallow_2, stack), 1 seed: 8 runs; about ")
    begun = [line for line in lines if ", 4 layers x" in line or " layers x" in line]
    assert sorted(line.split(":")[0] for line in begun) == [f"run {i} of 8" for i in range(1, 9)]
    assert sum("ended at loss" in line for line in lines) == 8
    with pytest.raises(UserError, match=r"parallel is 9999, and there are \d+ cores"):
        places(9999, pinned=True)


def test_on_gpus_each_run_has_a_device_of_its_own(tmp_path: Path) -> None:
    assert comparison(tmp_path, seeds=1, places=places(2, pinned=True, gpus=["4", "7", "9"])).run() == []
    assert {end["device"] for end in summaries(tmp_path).values()} == {"4", "7"}
    assert [place.environment for place in places(1, pinned=True, gpus=["4", "7"])] == [{}]
    with pytest.raises(UserError, match="parallel is 3, and there are 2 GPUs"):
        places(3, pinned=True, gpus=["4", "7"])


def test_a_task_is_one_arm_and_seed_and_more_can_be_added(tmp_path: Path) -> None:
    assert comparison(tmp_path).run(task=1) == []
    assert sorted(summaries(tmp_path)) == [f"scratch/x{budget}/seed-2" for budget in ("0.5", "0.7", "1.4", "1")]
    with pytest.raises(UserError, match="task 8 is not among the 8 of 4 arms .scratch, shallow_1, .* and 2 seeds"):
        comparison(tmp_path).run(task=8)
    comparison(tmp_path, arms=["scratch", "late"], seeds=3, budgets=[0.25, 1, 1.4, 2]).plan()
    saved = plan(tmp_path)
    assert list(saved["arms"]) == ["scratch", "shallow_1", "shallow_2", "stack", "late"]
    assert saved["budgets"] == [0.25, 0.5, 0.7, 1.0, 1.4, 2.0]
    assert (saved["seeds"], saved["added_seeds"]) == ([1, 2], [3]), "a run has ended: results could have been seen"
    assert len([run for run in saved["runs"] if run.startswith("scratch/")]) == 3 * 6
    assert saved["added_arms"] == ["late"] and saved["added_budgets"] == [0.25, 2.0]
    with pytest.raises(UserError, match="comparison of another recipe"):
        comparison(tmp_path, "--lr=1e-4").plan()


def test_seeds_may_be_fixed_anew_before_the_first_result(tmp_path: Path) -> None:
    comparison(tmp_path).plan()
    comparison(tmp_path, seeds=4).plan()
    assert (plan(tmp_path)["seeds"], plan(tmp_path)["added_seeds"]) == ([1, 2, 3, 4], [])


def test_what_a_comparison_is_gone_on_with_is_noted(tmp_path: Path) -> None:
    comparison(tmp_path).plan()
    saved = plan(tmp_path)
    assert saved["machine"]["processor"] and saved["machine"]["cores"] == os.cpu_count()
    comparison(tmp_path, arms=["scratch", "late"]).plan()
    keys = ("added_arms", "added_budgets", "later_versions", "later_parallel")
    assert not any(plan(tmp_path).get(key) for key in keys), "no result could have been seen"
    old = saved["versions"] | {"torch": "1.0"}
    path = tmp_path / "compare/comparison.json"
    # as an earlier program wrote it
    path.write_text(json.dumps({name: v for name, v in saved.items() if name != "machine"} | {"versions": old}))
    for _ in range(2):
        comparison(tmp_path, places=[Place(), Place()]).plan()
    assert plan(tmp_path)["later_versions"] == [saved["versions"]] and plan(tmp_path)["versions"] == old
    assert plan(tmp_path)["later_parallel"] == [2] and plan(tmp_path)["parallel"] == 1


def test_every_arm_is_tuned_on_seeds_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BEST", "0.0063")
    own = ["mine=1:10,4:90,lr=0.01"]
    assert comparison(tmp_path, tune=2, own=own, seeds=1).run() == []
    saved = plan(tmp_path)
    assert saved["tuning"]["seeds"] == [100_001, 100_002]
    for arm in ("scratch", "shallow_1", "shallow_2", "stack"):
        assert saved["tuning"]["arms"][arm] == {
            "rates": [0.001333, 0.002, 0.003, 0.0045, 0.00675, 0.01013], "chosen": 0.00675,
        }  # fmt: skip
        assert saved["arms"][arm]["lr"] == 0.00675
    assert "mine" not in saved["tuning"]["arms"] and saved["arms"]["mine"]["lr"] == 0.01
    ends = summaries(tmp_path)
    assert {path for path in ends if path.startswith("stack/lr")} == {
        f"stack/lr{lr:g}/seed-{seed}"
        for lr in saved["tuning"]["arms"]["stack"]["rates"]
        for seed in (100_001, 100_002)
    }
    assert set(ends) == set(saved["runs"])
    rates = {
        path: json.loads((tmp_path / "compare" / path / "config.json").read_text())["lr"]
        for path in ends
        if path.endswith("seed-1")
    }
    assert {lr for path, lr in rates.items() if not path.startswith("mine")} == {0.00675}
    assert rates["mine/flops/seed-1"] == 0.01
    assert comparison(tmp_path, tune=2, own=own, seeds=1).run() == [], "nothing is left to do"
    with pytest.raises(UserError, match="was tuned on 2 seeds, and not on 0; give --tune 2"):
        comparison(tmp_path, own=own, seeds=1).plan()


def test_a_rate_that_diverges_is_not_chosen_and_other_failures_are_no_word_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BEST", "0.003")
    monkeypatch.setenv("FAKE_DIVERGE", "0.0025")
    assert comparison(tmp_path, tune=1, seeds=1, arms=["scratch"]).run() == []
    assert plan(tmp_path)["arms"]["scratch"]["lr"] == 0.002
    shutil.rmtree(tmp_path / "compare")
    monkeypatch.setenv("FAKE_FAIL", "scratch/lr0.003/seed-100001")
    monkeypatch.delenv("FAKE_DIVERGE")
    assert comparison(tmp_path, tune=1, seeds=1, arms=["scratch"]).run() == ["scratch/lr0.003/seed-100001"]
    assert plan(tmp_path)["tuning"]["arms"]["scratch"]["chosen"] is None
    assert not (tmp_path / "compare/scratch/x1").exists(), "no run that counts without a rate"
    monkeypatch.delenv("FAKE_FAIL")
    assert comparison(tmp_path, tune=1, seeds=1, arms=["scratch"]).run() == []
    assert plan(tmp_path)["arms"]["scratch"]["lr"] == 0.003


def test_a_task_tunes_its_own_arm_alone(tmp_path: Path) -> None:
    assert comparison(tmp_path, tune=1, seeds=2).run(task=7) == []
    assert {path.split("/")[0] for path in summaries(tmp_path)} == {"stack"}
    assert "stack/flops/seed-2" in summaries(tmp_path) and "stack/flops/seed-1" not in summaries(tmp_path)


def test_minutes_are_what_all_runs_take(tmp_path: Path) -> None:
    seconds = 20 * 2.5 + 30 * 3.5 + 50 * 5.0
    comparison(tmp_path, "--warmup_steps=2", seeds=1, minutes=40.0).plan()
    saved = plan(tmp_path)
    assert saved["unit"] * seconds < 2400 and saved["minutes"] == 40.0
    total = sum(
        steps * saved["costs"][str(layers)]["seconds"] for stages in saved["runs"].values() for layers, steps in stages
    )
    assert total == pytest.approx(2400 - 8 * saved["overhead"], rel=0.03)
    with pytest.raises(UserError, match="was planned for 40.0 minutes"):
        comparison(tmp_path, "--warmup_steps=2", seeds=1, minutes=30.0).plan()
    with pytest.raises(UserError, match="1 minutes leave"):
        comparison(tmp_path / "other", "--warmup_steps=2", seeds=1, minutes=1.0).plan()
    assert not (tmp_path / "other/compare").exists()


def test_an_arm_of_the_same_name_is_the_same_arm(tmp_path: Path) -> None:
    comparison(tmp_path, own=["mine=1:10,4:90"]).plan()
    with pytest.raises(UserError, match="has another arm mine"):
        comparison(tmp_path, own=["mine=1:20,4:80"]).plan()
    with pytest.raises(UserError, match="has no cost of 3 layers"):
        comparison(tmp_path, own=["other=3:20,4:80,operator=last"]).plan()


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
    assert len(comparison(tmp_path, "--lr=1e-3", seeds=1).plan()["runs"]) == 8, (
        "the mended command works in the same folder"
    )
    with pytest.raises(UserError, match=r"of another recipe \(lr 0.001, not 9.0\)"):
        comparison(tmp_path, "--lr=9").plan()


def test_a_pilot_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the pilot ended with code 1: it said nothing"):
        comparison(tmp_path, launch=["false"]).run()
    assert comparison(tmp_path, seeds=1).plan()["runs"]


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
        ({"recipe": {"a\n": 1}}, "recipe.stages: field required"),
        ({"clock": "cpu"}, "of another recipe .clock 'cpu', not 'wall'"),
        ({"runs": {"a": "x"}}, "runs.a"),
        ({"runs": {"a/flops/seed-1": []}}, "runs names 'a/flops/seed-1', which is none of compare.py's"),
        ({"version": 1}, "is of version 1, and this program reads version 2"),
        ({"unit": 0}, "unit"),
        ({"tuning": {"seeds": [], "factor": 1.5, "arms": {"a": {"rates": [1e400], "chosen": None}}}}, "tuning.arms.a"),
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
    assert len(comparison(tmp_path, seeds=1).plan()["runs"]) == 8
    shutil.rmtree(tmp_path / "compare")
    (tmp_path / "compare/pilot/.owner").mkdir(parents=True)
    assert len(comparison(tmp_path, seeds=1).plan()["runs"]) == 8


def test_the_pilot_s_record_is_known_again(planned: Path) -> None:
    assert is_pilot(planned)


def test_what_others_put_beside_a_refused_pilot_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pilot")
    begun = comparison(tmp_path)
    start = begun.starter.start

    def busy(*arguments: Any) -> tuple[int, str]:
        (tmp_path / "compare/notes.txt").write_text("mine")
        return start(*arguments)

    monkeypatch.setattr(begun.starter, "start", busy)
    with pytest.raises(UserError, match="the disk is full"):
        begun.run()
    assert [path.name for path in (tmp_path / "compare").iterdir()] == ["notes.txt"]


def test_places_that_are_no_comparison_s(tmp_path: Path) -> None:
    (tmp_path / "compare/.git").mkdir(parents=True)
    with pytest.raises(UserError, match="is a checkout of git"):
        comparison(tmp_path)


def test_who_waits_for_a_tuning_hears_a_stop(tmp_path: Path) -> None:
    comparison(tmp_path, tune=1).plan()
    waiting = comparison(tmp_path, tune=1)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with FileLock(tmp_path / "compare/.tune-stack"), pytest.raises(RunAgain, match="SIGTERM"):
        timer.start()
        waiting.run(task=6)


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


def test_a_rate_that_another_task_has_added_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that tuned was stopped after it had planned a fourth rate; one that had counted three takes over."""
    ours = comparison(tmp_path, tune=1)
    tune = ours._tune

    def late(arm: Any) -> list[str]:
        ours.book.add_rate(arm, 0.0045)
        return tune(arm)

    monkeypatch.setattr(ours, "_tune", late)
    assert ours.run(task=6) == []
    assert "stack/lr0.0045/seed-100001" in summaries(tmp_path)


def test_scratch_may_come_later_than_its_arms(tmp_path: Path) -> None:
    comparison(tmp_path, arms=["stack"]).plan()
    comparison(tmp_path, arms=["scratch", "stack"]).plan()
    comparison(tmp_path, arms=["stack"]).plan()
    baselines = {name: arm["baseline"] for name, arm in plan(tmp_path)["arms"].items()}
    assert baselines == {"scratch": None, "shallow_1": "scratch", "shallow_2": "scratch", "stack": "scratch"}
