"""Reading a comparison: which runs count, which are named and left out, and what of comparison.json is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.studies.comparison.effects import gain, saving
from ds_stacking.studies.comparison.report import write_comparison
from ds_stacking.studies.comparison.results import read_comparison, unchecked
from tests.studies.comparison.made_up import ARMS, SPEED, UNIT, arm, change, falling, plan, write

SCRIPT = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": ...}, "is of version 1, and this program reads version 2; use the program that made it"),
        ({"version": 3}, "is of version 3"),
        ({"version": "2"}, "is of version '2', and this program reads"),
        ({"recipe": {}}, "recipe.stages: field required"),
        ({"clock": "sun"}, "clock: input should be 'wall' or 'cpu'"),
        ({"arms": {SCRIPT: ARMS["stack"]}}, "should match pattern"),
        ({"arms": {"scratch": "the final depth"}}, "arms.scratch"),
        (
            {"arms": ARMS | {"stack": arm("grown", [1], "stack")}},
            "the baseline of stack is 'stack', no arm of kind scr",
        ),
        ({"arms": ARMS | {"stack": arm("grown", [1], "nothing")}}, "the baseline of stack is 'nothing'"),
        ({"arms": ARMS | {"stack": arm("grown", [], "scratch")}}, "arms.stack.depths"),
        ({"runs": {"../../etc": []}}, "runs names '../../etc'"),
        ({"runs": {"stack/x1/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"shallow_1/time/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"scratch/flops/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"other/flops/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"scratch/x1e999/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"scratch/x1/seed-" + "9" * 5000: []}}, "which is none of compare.py's"),
        ({"runs": {"stack/flops/seed-1": [[1]]}}, "runs.stack/flops/seed-1"),
        ({"seeds": [-1]}, "seeds"),
        ({"tuning": {"seeds": [1], "arms": {"stack": {"rates": [0.0], "chosen": None}}}}, "tuning.arms.stack.rates"),
    ],
)
def test_a_damaged_plan_is_one_sentence(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "c")
    change(folder / "comparison.json", **fields)
    with pytest.raises(UserError) as caught:
        write_comparison(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "report").exists()


def test_a_folder_that_is_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no comparison"):
        write_comparison(tmp_path)


def test_only_runs_on_the_data_of_the_plan_are_compared(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    for path in ("stack/flops/seed-2", "scratch/x0.7/seed-3"):
        change(folder / path / "summary.json", data_fingerprint="other")
    results = read_comparison(folder)
    assert results.foreign == {"stack/flops/seed-2": "other", "scratch/x0.7/seed-3": "other"}
    assert list(results.of("stack", "flops")) == [1, 3, 4, 5]
    assert len(results.frontier("scratch", 3, "flops")) == 3
    text = write_comparison(folder)
    assert "Not compared, since on other data: stack/flops/seed-2 (other) and scratch/x0.7/seed-3 (other)." in text
    assert len(json.loads((folder / "report/report.json").read_text())["ends"]) == 33


def test_tuning_runs_do_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", plan(tuned={"stack": [0.00133, 0.002, 1e-5]}))
    results = read_comparison(folder)
    assert sorted(end.path for end in results.tuning) == [f"stack/lr{r}/seed-100001" for r in (0.00133, 0.002, 1e-05)]
    assert {end.seed for end in results.ends} == {1, 2, 3, 4, 5} and results.labels("stack") == ["flops"]


def test_savings_and_gains_are_those_of_numpy(tmp_path: Path) -> None:
    """Interpolated here by numpy from the files, in the logarithm of the cost."""
    folder = write(tmp_path / "c", plan(timed=["stack"]))
    for path in folder.glob("stack/time/*/summary.json"):
        change(path, eval_loss_masked=5.7)
    results = read_comparison(folder)
    for cost, field, label in (
        ("flops", "flops", "flops"),
        ("tokens", "tokens", "flops"),
        ("seconds", "cpu_seconds", "time"),
    ):
        gains, savings = gain(results, "stack", cost).values, saving(results, "stack", cost).values
        for seed in SPEED:
            ends = [
                json.loads((folder / f"scratch/x{b}/seed-{seed}/summary.json").read_text())
                for b in ("0.5", "0.7", "1", "1.4")
            ]
            own = json.loads((folder / f"stack/{label}/seed-{seed}/summary.json").read_text())
            costs, losses = [np.log(end[field]) for end in ends], [end["eval_loss_masked"] for end in ends]
            same = np.interp(np.log(own[field]), costs, losses, right=np.nan)
            needed = np.exp(np.interp(own["eval_loss_masked"], losses[::-1], costs[::-1]))
            expected = None if np.isnan(same) else pytest.approx(same - own["eval_loss_masked"])
            assert gains[seed] == expected
            assert savings[seed] == pytest.approx(1 - own[field] / needed)
    assert saving(results, "stack", "flops").values == pytest.approx({s: 1 - 1 / speed for s, speed in SPEED.items()})
    assert gain(results, "stack", "tokens").mean is None, "far more tokens than any budget of scratch"


def test_the_clock_of_the_plan_counts(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", plan() | {"clock": "wall"})
    end = read_comparison(folder).of("scratch", "x1")[1]
    assert end.seconds == end.wall_seconds == pytest.approx(1.4 * end.cpu_seconds)
    assert end.flops == UNIT


def test_a_run_of_equal_flops_serves_for_equal_time_where_none_is_planned(tmp_path: Path) -> None:
    both = read_comparison(write(tmp_path / "a"))
    assert both.of("stack", "time") == both.of("stack", "flops")
    folder = write(tmp_path / "b", plan(timed=["stack"]))
    (folder / "stack/time/seed-2/summary.json").unlink()
    assert list(read_comparison(folder).of("stack", "time")) == [1, 3, 4, 5], "it is not finished, so there is none"


@pytest.mark.parametrize("factor", [0.85, 0.95, 1.09, 1.2])
def test_times_far_from_the_median_of_their_shape_are_not_used(tmp_path: Path, factor: float) -> None:
    folder = write(tmp_path / "c")
    path = folder / "stack/flops/seed-2/summary.json"
    seconds = json.loads(path.read_text())["cpu_seconds"]
    change(path, cpu_seconds=factor * seconds, training_seconds=9 * seconds)
    results, is_off = read_comparison(folder), abs(factor - 1) > 0.1
    assert list(results.untimed) == (["stack/flops/seed-2"] if is_off else [])
    for found in (gain(results, "stack", "seconds"), saving(results, "stack", "seconds")):
        assert list(found.left_out) == ([2] if is_off else [])
        assert (2 in found.values) != is_off and found.mean is not None
    assert 2 in gain(results, "stack", "flops").values, "FLOPs are what they are"
    text = write_comparison(folder)
    assert ("The time of stack/flops/seed-2 is not used" in text) == is_off
    assert ("stack has no gain at equal time and no saving of time in seed 2." in text) == is_off


def test_a_disturbed_run_of_scratch_takes_its_seed_from_all_arms(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    change(folder / "scratch/x0.7/seed-4/summary.json", cpu_seconds=1000.0)
    results = read_comparison(folder)
    assert list(results.untimed) == ["scratch/x0.7/seed-4"]
    for name in ("stack", "shallow_1", "shallow_2"):
        assert list(gain(results, name, "seconds").left_out) == [4]


@pytest.mark.parametrize(("seeds", "flagged"), [([1], False), ([1, 2], True), ([1, 2, 3], True)])
def test_fewer_than_three_runs_of_a_shape_cannot_be_checked(tmp_path: Path, seeds: list[int], flagged: bool) -> None:
    """Of two that are far apart both are flagged, of one nothing is known: the report says so."""
    folder = write(tmp_path / "c", plan(seeds=seeds))
    change(folder / "stack/flops/seed-1/summary.json", cpu_seconds=300.0)
    results = read_comparison(folder)
    expected = {1: 0, 2: 2, 3: 1}[len(seeds)]
    assert len(results.untimed) == expected and bool(expected) == flagged
    assert len(unchecked(results)) == (len(results.ends) if len(seeds) < 3 else 0)
    said = f"cannot be checked for {7 * len(seeds)} runs: fewer than three of one shape have finished."
    assert (said in write_comparison(folder)) == (len(seeds) < 3)


def test_runs_with_the_same_stages_are_of_one_shape_whatever_their_arm(tmp_path: Path) -> None:
    arms = ARMS | {"reset": arm("grown", [1, 2, 4], "scratch")}
    folder = write(tmp_path / "c", plan(arms=arms, seeds=[1]), falling)
    change(folder / "stack/flops/seed-1/summary.json", cpu_seconds=200.0)
    assert set(read_comparison(folder).untimed) == {"stack/flops/seed-1", "reset/flops/seed-1"}, "which is off?"
