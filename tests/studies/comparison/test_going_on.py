"""The plan of a comparison: what it says, what may be added, what another one is, and whose folder it is."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.studies.comparison.starting import Slot
from tests.studies.comparison.fake_runs import a_run, comparison, plan, summaries


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


def test_a_comparison_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Version 009532d planned it: its recipe has eval_blocks and lacks three fields of corpus."""
    (tmp_path / "compare").mkdir()
    shutil.copy(Path(__file__).with_name("earlier_comparison.json"), tmp_path / "compare/comparison.json")
    before = plan(tmp_path)
    without_effect = ["--corpus.workers=3", "--corpus.near_duplicates=0.8", "--log_every=1", "--hang_timeout=9"]
    for options in ([], without_effect):
        comparison(tmp_path, *options, seeds=1).plan()
        kept = ("recipe", "arms", "runs", "costs", "data_fingerprint", "seeds", "budgets")
        assert {name: plan(tmp_path)[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lr=1e-4", "--eval_sequences=8"], "eval_sequences 256 -> 8, lr 0.002 -> 0.0001"),
        (["--corpus.masking_rate=0.3"], "corpus.masking_rate 0.15 -> 0.3"),
        (["--model.norm=post"], 'model.norm "pre" -> "post"'),
        (["--data=elsewhere"], 'data "docs" -> "elsewhere"'),
        (["--stages=1:20,2:31,4:50"], "stages[1].steps 30 -> 31"),
    ],
)
def test_all_that_makes_another_comparison_is_named(tmp_path: Path, options: list[str], told: str) -> None:
    (tmp_path / "compare").mkdir()
    shutil.copy(Path(__file__).with_name("earlier_comparison.json"), tmp_path / "compare/comparison.json")
    with pytest.raises(
        UserError, match=rf"compare holds a comparison of another recipe \({re.escape(told)}\); choose"
    ):
        comparison(tmp_path, *options, seeds=1).plan()


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
        comparison(tmp_path, slots=[Slot(), Slot()]).plan()
    assert plan(tmp_path)["later_versions"] == [saved["versions"]] and plan(tmp_path)["versions"] == old
    assert plan(tmp_path)["later_parallel"] == [2] and plan(tmp_path)["parallel"] == 1


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


def test_scratch_may_come_later_than_its_arms(tmp_path: Path) -> None:
    comparison(tmp_path, arms=["stack"]).plan()
    comparison(tmp_path, arms=["scratch", "stack"]).plan()
    comparison(tmp_path, arms=["stack"]).plan()
    baselines = {name: arm["baseline"] for name, arm in plan(tmp_path)["arms"].items()}
    assert baselines == {"scratch": None, "shallow_1": "scratch", "shallow_2": "scratch", "stack": "scratch"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "comparison.json is damaged or no such file: it is no JSON"),
        ({"costs": {}}, "has no cost of 1 layers"),
        ({"costs": {"a": {}}}, "costs.a"),
        ({"costs": {"1": {"flops": 0, "seconds": 1}}}, "costs.1.flops"),
        ({"recipe": "x"}, "recipe: input should be an object"),
        ({"recipe": {"a\n": 1}}, "recipe.stages: field required"),
        (
            {"recipe": {"stages": [], "model": {"hidden_size": 1}, "data": "", "corpus": 1}},
            "recipe.corpus: input should be",
        ),
        ({"clock": "cpu"}, 'of another recipe .clock "cpu" -> "wall"'),
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


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compare").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        comparison(tmp_path)
    (tmp_path / "compare").unlink()
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run, and no comparison"):
        comparison(tmp_path)


@pytest.mark.parametrize("name", ["pilot", "scratch", "stack"])
def test_a_run_of_somebody_else_is_not_taken_for_the_comparison_s(tmp_path: Path, name: str) -> None:
    run = a_run(tmp_path / "compare" / name)
    with pytest.raises(UserError, match=rf"holds {name}/, and no comparison.json .*choose another --output_dir"):
        comparison(tmp_path)
    assert (run / "metrics.jsonl").read_text() == "months of work"
    assert [path.name for path in (tmp_path / "compare").iterdir()] == [name]


def test_places_that_are_no_comparison_s(tmp_path: Path) -> None:
    (tmp_path / "compare/.git").mkdir(parents=True)
    with pytest.raises(UserError, match="is a checkout of git"):
        comparison(tmp_path)
