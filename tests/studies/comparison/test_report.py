"""Statistics of a comparison against closed forms, and the report of complete and of broken comparisons."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.studies.comparison.report import rows, write_comparison
from ds_stacking.studies.comparison.results import cost_at, effect, loss_at, read_comparison

SPEED = {1: 1.25, 2: 1.3, 3: 1.2}
"""By seed: how many times the FLOPs scratch needs for the loss of the arm `stack`."""


def scratch_loss(flops: float, seed: int) -> float:
    """Losses that are linear in the logarithm of the cost, so that interpolation is exact."""
    return 8.0 + 0.1 * seed - 0.5 * math.log(flops)


def write_end(folder: Path, path: str, flops: float, loss: float, clock: float = 1.0) -> None:
    run = folder / path
    run.mkdir(parents=True)
    records = [
        {"kind": "eval", "step": i, "tokens": 10 * i, "flops": flops * i / 10, "seconds": i, "training_seconds": i,
         "cpu_seconds": clock * flops * i / 10, "eval_loss_masked": loss + (10 - i) / 10}
        for i in range(1, 11)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    totals = {"steps": 10, "tokens": 100, "flops": flops, "training_seconds": 10.0, "cpu_seconds": clock * flops}
    totals["data_fingerprint"] = "abc"
    (run / "summary.json").write_text(json.dumps({"finished": True, "eval_loss_masked": loss, **totals}))


def write(folder: Path) -> Path:
    """A comparison of scratch and stack over the seeds of SPEED, stack at twice the seconds per FLOP."""
    runs = [f"scratch/x{b:g}/seed-{s}" for b in (0.7, 1, 1.4) for s in SPEED] + [
        f"stack/flops/seed-{s}" for s in SPEED
    ]
    recipe = {"stages": [{"layers": 2, "steps": 5}], "model": {"hidden_size": 8}, "data": "docs"}
    arms = {"scratch": "deep from the start", "stack": "<grown>"}
    folder.mkdir()
    plan = {"recipe": recipe, "clock": "cpu", "arms": arms, "runs": dict.fromkeys(runs, [])}
    (folder / "comparison.json").write_text(json.dumps(plan))
    for seed, speed in SPEED.items():
        for budget in (0.7, 1, 1.4):
            write_end(folder, f"scratch/x{budget:g}/seed-{seed}", 100 * budget, scratch_loss(100 * budget, seed))
        write_end(folder, f"stack/flops/seed-{seed}", 100, scratch_loss(100 * speed, seed), clock=1.1)
    return folder


def test_savings_gains_and_intervals_are_the_closed_forms(tmp_path: Path) -> None:
    results = read_comparison(write(tmp_path / "c"))
    savings = [1 - 1 / speed for speed in SPEED.values()]
    saving = results.saving("stack", "flops")
    assert saving.values == pytest.approx(savings)
    half = 4.302652729911275 * statistics.stdev(savings) / math.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5 %
    assert saving.mean == pytest.approx(statistics.mean(savings))
    assert (saving.low, saving.high) == pytest.approx((saving.mean - half, saving.mean + half))
    assert results.gain("stack", "flops").values == pytest.approx([0.5 * math.log(speed) for speed in SPEED.values()])
    assert results.saving("stack", "seconds").values == pytest.approx([1 - 1.1 / speed for speed in SPEED.values()])


def test_nothing_is_claimed_outside_the_budgets_of_scratch(tmp_path: Path) -> None:
    frontier = [(70.0, 3.0), (100.0, 2.5), (140.0, 2.3)]
    assert loss_at(frontier, 69) is None and loss_at(frontier, 141) is None
    assert cost_at(frontier, 3.1) is None and cost_at(frontier, 2.2) is None
    assert loss_at(frontier, math.sqrt(7000)) == pytest.approx(2.75)
    assert cost_at(frontier, 2.75) == pytest.approx(math.sqrt(7000))
    assert cost_at([(70.0, 3.0), (100.0, 3.1), (140.0, 2.3)], 2.75) is None, "more cost did not help"
    assert effect([0.1, None]).mean is None, "leaving a seed out would flatter"
    assert effect([0.1]).low is None and effect([]).mean is None


def test_below_all_of_scratch_a_saving_has_a_lower_bound(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    results = read_comparison(folder)
    assert results.least_saving("stack", "flops") is None, "scratch reaches its loss"
    for seed in SPEED:
        path = folder / f"stack/flops/seed-{seed}/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_loss_masked": 1.0}))
    results = read_comparison(folder)
    assert results.least_saving("stack", "flops") == pytest.approx(1 - 100 / 140)
    assert rows(results)[-1][6] == "> 29 %" and results.saving("stack", "flops").mean is None


def test_runs_on_other_data_are_not_compared(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    path = folder / "stack/flops/seed-2/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_fingerprint": "other"}))
    results = read_comparison(folder)
    assert results.gain("stack", "flops").values[1] is None and results.gain("stack", "flops").mean is None
    assert rows(results)[-1][5] == "+0.112, outside, +0.091"
    assert "data changed between runs (seeds 1, 2, 3; seed 2)" in write_comparison(folder)


def test_the_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    text = write_comparison(folder)
    assert "| stack | 3 |" in text and "[" in text
    page = (folder / "report/report.html").read_text()
    assert "http" not in page and "<script" not in page and page.count("<svg") == 3
    assert "&lt;grown&gt;" in page and "<grown>" not in page
    report = json.loads((folder / "report/report.json").read_text())
    assert report["finished"] is True and len(report["ends"]) == 12
    assert (folder / "report/comparison.png").stat().st_size > 10_000


def test_failed_and_missing_runs_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    (folder / "stack/flops/seed-2/summary.json").unlink()
    (folder / "stack/flops/seed-2.failed").write_text("ended with code 1: out of memory\n")
    (folder / "scratch/x1/seed-3/summary.json").write_text('{"finished"')
    text = write_comparison(folder)
    assert "stack/flops/seed-2 failed: ended with code 1: out of memory" in text
    assert f"scratch/x1/seed-3 failed: {folder}/scratch/x1/seed-3/summary.json is damaged" in text
    results = read_comparison(folder)
    assert len(results.ends) == 10 and results.saving("stack", "flops").mean is not None
    assert [row[0] for row in rows(results)] == ["scratch x0.7", "scratch x1", "scratch x1.4", "stack"]
    for path in folder.glob("*/*/*/summary.json"):
        path.unlink()
    assert "Not finished" in write_comparison(folder), "nothing has finished yet"


def test_a_folder_that_is_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no comparison"):
        write_comparison(tmp_path)


SCRIPT = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {}}, "recipe.stages: field required"),
        ({"clock": "sun"}, "clock: input should be 'wall' or 'cpu'"),
        ({"arms": {SCRIPT: "x"}}, "should match pattern"),
        ({"runs": {"../../etc": []}}, "runs names '../../etc'"),
        ({"runs": {"stack/x1/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"scratch/x1e999/seed-1": []}}, "which is none of compare.py's"),
        ({"runs": {"scratch/x1/seed-" + "9" * 5000: []}}, "which is none of compare.py's"),
    ],
)
def test_a_damaged_plan_is_one_sentence(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write(tmp_path / "c")
    path = folder / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        write_comparison(folder)
    assert not (folder / "report").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("finished", "x"), ("flops", 0), ("flops", None), ("training_seconds", -1), ("steps", "x"), ("tokens", 1e308)],
)
def test_a_run_whose_summary_is_damaged_has_failed(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path / "c")
    path = folder / "stack/flops/seed-2/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert f"stack/flops/seed-2 failed: {path} is damaged or no such file: {field}" in write_comparison(folder)


@pytest.mark.parametrize("content", ["", "null\n", '{"kind": "eval", "step": 1}\n'])
def test_a_run_without_metrics_has_no_curve(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "c")
    (folder / "stack/flops/seed-2/metrics.jsonl").write_text(content)
    assert ("stack/flops/seed-2 has no curve" in write_comparison(folder)) == (content == "null\n")
    (folder / "stack/flops/seed-2/metrics.jsonl").unlink()
    assert "stack/flops/seed-2 has no curve" in write_comparison(folder)


def test_texts_of_a_comparison_are_neither_html_nor_terminal_codes(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    path = folder / "comparison.json"
    plan = json.loads(path.read_text())
    plan["arms"] = {arm: SCRIPT + "$\\frac" for arm in plan["arms"]}
    plan["recipe"]["data"] = SCRIPT
    path.write_text(json.dumps(plan))
    (folder / "stack/flops/seed-2/summary.json").unlink()
    (folder / "stack/flops/seed-2.failed").write_bytes(b"\x1b[2J\x07" + SCRIPT.encode() + b"\n\xff" + b"x" * 1000)
    text = write_comparison(folder)
    assert "\x1b" not in text and "\x07" not in text and "x" * 501 not in text
    assert "<script" not in (folder / "report/report.html").read_text()


@pytest.mark.parametrize("name", ["report", "comparison.json", "stack/flops/seed-2", "stack/flops/seed-2.failed"])
def test_links_in_a_comparison_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "c")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "summary.json").write_text('{"finished": "SECRET"}')
    path = folder / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "secret")
    try:
        text = write_comparison(folder)
    except UserError as error:
        text = str(error)
    assert "is a link" in text or name.endswith(".failed")
    assert "SECRET" not in text and [path.name for path in (tmp_path / "secret").iterdir()] == ["summary.json"]
