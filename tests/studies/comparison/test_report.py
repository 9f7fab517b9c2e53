"""The report of complete and of broken comparisons: what stands in it, and that nothing of theirs runs or escapes."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from ds_stacking.common.errors import UserError
from ds_stacking.studies.comparison.report import write_comparison
from ds_stacking.studies.comparison.results import read_comparison
from ds_stacking.studies.comparison.tables import pair_rows, saving_rows
from tests.reports.browser import look, needs_browser
from tests.studies.comparison.made_up import ARMS, SPEED, arm, change, falling, plan, write

SCRIPT = "<script>alert(1)</script>"
STACK = "stack/flops/seed-2"
MANY = ARMS | {
    "scratch_wsd": arm("scratch", [4], None),
    "reset": arm("grown", [1, 2, 4], "scratch"),
    "late": arm("grown", [1, 4], "scratch_wsd"),
    "mine": arm("own", [1, 4], "scratch", meaning="as given: 1:80,4:448,lr=1e-3"),
}


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report/report.json").read_text()))


def test_every_output_begins_with_the_conclusion(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", None, lambda name, units, seed: falling(name, units, seed) - 0.9 * ("low" in name))
    text = write_comparison(folder)
    report, page = report_of(folder), (folder / "report/report.html").read_text()
    first = text.splitlines()[0]
    assert first.startswith("Depth does not pay here: 2 layers throughout (shallow_2) end 0.")
    assert (folder / "report/table.md").read_text().splitlines()[0] == first == report["conclusion"][0]
    assert f'<h1>Does stacking pay?</h1>\n<p class="first">{first}</p>' in page
    assert report["depth_pays"] is False and "Saving at equal loss, which means nothing here" in page
    assert "Saving at equal loss, which means nothing here" in text


def test_the_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", plan(arms=MANY, tuned={"stack": [0.001, 0.002, 0.004]}))
    write_comparison(folder)
    page = (folder / "report/report.html").read_text()
    assert "http" not in page and "<script" not in page and "url(" not in page.replace("url(#", "")
    assert page.count("<svg") == 4
    assert page.count("cache model") == 4 and "as given: 1:80,4:448,lr=1e-3" in page
    assert (folder / "report/comparison.png").stat().st_size > 20_000


def test_the_json_carries_what_the_page_says(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", plan(tuned={"stack": [0.001, 0.002, 0.004]}))
    write_comparison(folder)
    report, page = report_of(folder), (folder / "report/report.html").read_text()
    assert report["version"] == 2 and report["finished"] is True and report["depth_pays"] is True
    for sentence in report["conclusion"] + report["notes"]:
        assert sentence.replace("'", "&#x27;") in page
    stack = report["arms"]["stack"]
    assert stack["saving"]["flops"]["values"] == pytest.approx({str(s): 1 - 1 / v for s, v in SPEED.items()})
    deviation = statistics.stdev(1 - 1 / speed for speed in SPEED.values())
    needed = next(n for n in range(2, 99) if stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n) <= 0.05)
    assert stack["power"] == {"half": 0.05, "of_saving": True, "seeds": needed} and stack["saving"]["flops"]["n"] == 5
    assert len(report["ends"]) == 35 and len(report["tuning"]) == 3 and len(report["pairs"]) == 6
    assert {check["arm"]: check["pays"] for check in report["depth"]} == {"shallow_1": True, "shallow_2": True}
    (tuned,) = report["tuned_rates"]
    assert tuned["chosen"] == 0.002 and not tuned["at_edge"] and list(tuned["rates"]) == ["0.001", "0.002", "0.004"]


def test_pairs_are_paired_t_tests_of_the_ends_at_equal_flops(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    write_comparison(folder)
    labels = {"scratch": "x1", "shallow_1": "flops", "shallow_2": "flops", "stack": "flops"}
    losses = {
        name: [
            json.loads((folder / name / label / f"seed-{s}" / "summary.json").read_text())["eval_loss_masked"]
            for s in SPEED
        ]
        for name, label in labels.items()
    }
    found = report_of(folder)["pairs"]
    p_values = []
    for pair in found:
        test = stats.ttest_rel(losses[pair["first"]], losses[pair["second"]])
        interval, difference = test.confidence_interval(0.95), pair["difference"]
        assert (difference["low"], difference["high"]) == pytest.approx((interval.low, interval.high))
        p_values.append(test.pvalue)
    smallest = min(range(6), key=p_values.__getitem__)
    assert found[smallest]["adjusted"] == pytest.approx(6 * p_values[smallest])
    assert pair_rows(read_comparison(folder))[0][0] == "scratch − shallow_1"
    assert "The intervals are not corrected for the number of pairs, 6;" in (folder / "report/report.html").read_text()


def test_below_all_of_scratch_a_saving_has_a_lower_bound(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    for path in folder.glob("stack/*/*/summary.json"):
        change(path, eval_loss_masked=1.0)
    row = next(row for row in saving_rows(read_comparison(folder)) if row[0] == "stack")
    assert row[1] == f"> {100 * (1 - 1 / 1.4):.0f} %" and row[2].startswith("> ")
    change(folder / STACK / "summary.json", eval_loss_masked=5.8)
    row = next(row for row in saving_rows(read_comparison(folder)) if row[0] == "stack")
    assert row[1].count("outside") == 4, "the seeds one by one"


def test_what_the_check_of_depth_leaves_out_stands_beside_savings_of_time(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    said = "Whether depth pays was looked at for equal FLOPs only, not for equal time, and at 1 and 2 layers only."
    assert said in write_comparison(folder) and said in report_of(folder)["notes"]
    page = (folder / "report/report.html").read_text()
    assert page.count(said) == 2 and "adds 0.3 to 0.4 points to a saving of 10 to 20 %" in page
    alone = write(tmp_path / "d", plan(arms={name: ARMS[name] for name in ("scratch", "stack")}))
    assert "Whether depth pays was looked at" not in write_comparison(alone)


def test_runs_whose_flops_are_not_equal_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    for path in folder.glob("stack/*/*/summary.json"):
        change(path, flops=5.5e12)
    assert "The FLOPs of scratch are 0.909 times those of stack" in write_comparison(folder)


def test_failed_and_missing_runs_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    (folder / STACK / "summary.json").unlink()
    (folder / f"{STACK}.failed").write_text("ended with code 1: out of memory\n")
    (folder / "scratch/x1/seed-3/summary.json").write_text('{"finished"')
    (folder / "shallow_1/flops/seed-4/summary.json").unlink()
    text = write_comparison(folder)
    assert f"{STACK} failed: ended with code 1: out of memory" in text
    assert f"scratch/x1/seed-3 failed: {folder}/scratch/x1/seed-3/summary.json is damaged" in text
    assert "Not finished: shallow_1/flops/seed-4." in text and "32 of 35 runs have finished, 2 failed" in text
    report = report_of(folder)
    values = report["arms"]["stack"]["gain"]["flops"]["values"]
    assert [seed for seed, value in values.items() if value is None] == ["2", "3"], "its own, and scratch's"
    assert len(report["ends"]) == 32 and report["arms"]["stack"]["gain"]["flops"]["mean"] is None
    for path in folder.glob("*/*/*/summary.json"):
        path.unlink()
    assert write_comparison(folder).startswith("Nothing can be said yet: none of the 35 runs that count has finished.")


@pytest.mark.parametrize(
    ("field", "value"),
    [("finished", "x"), ("flops", 0), ("flops", None), ("training_seconds", -1), ("steps", "x"), ("tokens", 1e308)]
    + [("cache_loss", "x"), ("tokens", 0), ("eval_loss_masked", 1e300), ("data_fingerprint", 1)],
)
def test_a_run_whose_summary_is_damaged_has_failed(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path / "c", plan(seeds=[1, 2]))
    change(folder / STACK / "summary.json", **{field: value})
    path = folder / STACK / "summary.json"
    assert f"{STACK} failed: {path} is damaged or no such file: {field}" in write_comparison(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("eval_loss_masked", -1e39), ("eval_loss_masked", 1e39), ("flops", 1e39), ("flops", 1e-12), ("cpu_seconds", 1e39)]
    + [("tokens", 1e-12), ("cache_loss", 1e39), ("steps", 2**53)],
)
def test_extreme_ends_do_not_break_the_report(tmp_path: Path, field: str, value: object) -> None:
    folder = write(tmp_path / "c", plan(seeds=[1, 2]))
    for path in (STACK, "scratch/x0.5/seed-1", "scratch/x1/seed-1"):
        change(folder / path / "summary.json", **{field: value})
    write_comparison(folder)
    report_of(folder)


@pytest.mark.parametrize("content", ["", "null\n", '{"kind": "eval", "step": 1}\n'])
def test_a_run_without_metrics_has_no_curve(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "c", plan(seeds=[1, 2]))
    (folder / STACK / "metrics.jsonl").write_text(content)
    assert (f"{STACK} has no curve" in write_comparison(folder)) == (content == "null\n")
    (folder / STACK / "metrics.jsonl").unlink()
    assert f"{STACK} has no curve" in write_comparison(folder)


def test_texts_of_a_comparison_are_neither_html_nor_terminal_codes(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", plan(seeds=[1, 2]))
    hostile = "\x1b[2J\x07" + SCRIPT + "$\\frac"
    made = json.loads((folder / "comparison.json").read_text())
    recipe, arms = made["recipe"] | {"data": hostile}, made["arms"]
    arms = {name: made | {"meaning": hostile} for name, made in arms.items()}
    change(folder / "comparison.json", recipe=recipe, arms=arms, commit=hostile, versions={hostile: hostile})
    change(folder / "stack/flops/seed-1/summary.json", data_fingerprint=hostile)
    (folder / STACK / "summary.json").unlink()
    (folder / f"{STACK}.failed").write_bytes(b"\x1b[2J\x07" + SCRIPT.encode() + b"\n\xff" + b"x" * 1000)
    text, page = write_comparison(folder), (folder / "report/report.html").read_text()
    assert "\x1b" not in text and "\x07" not in text and "x" * 501 not in text
    assert "<script" not in page and "\x1b" not in page


@pytest.mark.parametrize("name", ["report", "comparison.json", STACK, f"{STACK}.failed"])
def test_links_in_a_comparison_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "c", plan(seeds=[1, 2]))
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


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_it_reads_on_a_phone_and_a_desk_dark_and_light(tmp_path: Path, width: int, dark: bool) -> None:
    folder = write(tmp_path / "c", plan(arms=MANY, timed=["stack"], tuned={"stack": [0.001, 0.002, 0.004]}))
    write_comparison(folder)
    picture, found, text = look(folder / "report/report.html", width=width, dark=dark)
    assert found <= width, "nothing hangs over the edge"
    assert text.startswith("Does stacking pay?") and "Every two arms at equal FLOPs" in text
    corner = picture[5, 3, :3].mean()
    assert corner < 0.15 if dark else corner > 0.95
