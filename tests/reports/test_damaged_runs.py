"""Run directories that are damaged, of an older version or from somebody hostile: a page, or one sentence."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common import files, json_files
from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.reports import run_files
from ds_stacking.reports.run_files import read_metrics
from ds_stacking.reports.run_report import write_report
from tests.reports.test_run_report import SUMMARY, write_run

SCRIPT = "<script>alert(1)</script>"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def change_lines(run: Path, change: Change) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        change(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"null\n", b"[1]\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\0{}\n", b"{{}\n"])
def test_damaged_files_are_named(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        write_report(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", [1]),
        ("kind", None),
        ("step", "x"),
        ("step", -1),
        ("step", 0.5),
        ("step", 10**300),
        ("tokens", float("inf")),
        ("tokens", -5),
        ("flops", "x"),
        ("loss", float("nan")),
        ("loss", 1e308),
        ("lr", []),
        ("weight_norm", {"a": 1.0}),
        ("weight_norm", {"1": "x"}),
        ("from_layers", "x"),
        ("operator", 7),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_its_line(run: Path, field: str, value: Any) -> None:
    change_lines(run, lambda record: record.update({field: value}))
    with pytest.raises(UserError, match=rf"metrics.jsonl line 1 is damaged or no such file: {field}"):
        write_report(run)


@pytest.mark.parametrize(
    "field",
    [
        *("stage", "layers", "tokens", "flops", "seconds", "loss", "eval_loss", "lr", "tokens_per_second"),
        *("from_layers", "to_layers", "operator", "steps_since", "weight_norm", "seconds_growth"),
    ],
)
def test_fields_that_older_runs_lack_are_left_out(run: Path, field: str) -> None:
    change_lines(run, lambda record: record.pop(field, None))
    assert "</html>" in write_report(run).read_text()


@pytest.mark.parametrize("field", ["tokens", "flops", "seconds", "loss", "eval_loss", "lr", "tokens_per_second"])
def test_null_is_a_number_that_was_not_finite(run: Path, field: str) -> None:
    change_lines(run, lambda record: record.update({field: None}))
    change_lines(run, lambda record: record.get("weight_norm", {}).update({"0": None}))
    assert "</html>" in write_report(run).read_text()


@pytest.mark.parametrize(
    "summary",
    [
        {"finished": "yes"},
        {"stages": "x"},
        {"stages": [1]},
        {"stages": [{}]},
        {"eval_loss_masked": "x"},
        {"tokens": float("nan")},
        {"steps": "many"},
        {"growths": [1]},
        {"growths": [{"stage": "x"}]},
    ],
)
def test_a_damaged_summary_is_named_with_its_field(run: Path, summary: dict[str, Any]) -> None:
    (run / "summary.json").write_text(json.dumps(SUMMARY | summary))
    with pytest.raises(UserError, match=f"summary.json is damaged or no such file: {next(iter(summary))}"):
        write_report(run)
    (run / "summary.json").write_text('{"finished": true, "growths": [{}]}')
    assert "Finished: ? steps" in write_report(run).read_text()


@pytest.mark.parametrize("order", [lambda i: 5, lambda i: 100 - i, lambda i: i * 7919 % 37])
def test_steps_in_any_order_are_no_fault(run: Path, order: Callable[[int], int]) -> None:
    numbers = iter(range(10_000))
    change_lines(run, lambda record: record.update(step=order(next(numbers))))
    assert "</html>" in write_report(run).read_text()
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("value", [0, 1e-320, 1e39])
def test_charts_stand_any_number(run: Path, value: float) -> None:
    change_lines(run, lambda record: record.update(tokens=value, flops=value, loss=value, eval_loss=-value))
    assert "nan" not in write_report(run).read_text()


def test_no_text_of_a_run_is_html(run: Path) -> None:
    def script(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: script(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [script(inner) for inner in value]
        return SCRIPT if isinstance(value, str) else value

    (run / "config.json").write_text(json.dumps({"name": SCRIPT, "versions": {SCRIPT: SCRIPT}}))
    (run / "summary.json").write_text(json.dumps(script(SUMMARY | {"name": SCRIPT})))
    change_lines(run, lambda record: record.update(operator=SCRIPT, optimizer_state=SCRIPT))
    change_lines(run, lambda record: record.update({SCRIPT: SCRIPT}))
    page = write_report(run).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "report"])
def test_links_in_a_run_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    if (run / name).exists():
        (run / name).rename(target)
    else:
        target.mkdir()
    (run / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link"):
        write_report(run)
    assert not target.is_dir() or not any(target.iterdir())


def test_a_link_in_the_place_of_the_page_is_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (run / "report").mkdir()
    (run / "report" / "report.html").symlink_to(tmp_path / "precious")
    assert "</html>" in write_report(run).read_text()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_full_disk_leaves_the_page_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_text()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunFailed, match=r"report.html cannot be written \(No space left on device\)"):
        write_report(run)
    assert (run / "report" / "report.html").read_text() == before
    assert [path.name for path in (run / "report").iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["", "x" * 10_000, "no\nsuch", "\0"])
def test_what_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="give the directory of a run"):
        write_report(name)


def test_metrics_without_end_are_bounded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_metrics(run)
    monkeypatch.setattr(run_files, "MOST", 10)
    thinned = read_metrics(run)
    trained = [record["step"] for record in thinned if record["kind"] == "train"]
    assert len(trained) <= 11 and trained[0] == 1 and thinned[-1] == whole[-1]
    assert set(b - a for a, b in zip(trained[:-1], trained[1:-1], strict=False)) == {4}, "evenly"
    assert [r for r in thinned if r["kind"] != "train"] == [r for r in whole if r["kind"] != "train"]
    monkeypatch.setattr(run_files, "LARGEST_REST", 600)
    with pytest.raises(UserError, match="holds more about growths than any run writes"):
        read_metrics(run)
    monkeypatch.setattr(json_files, "LONGEST_LINE", 50)
    with pytest.raises(UserError, match="line 1 has more than 50 bytes"):
        read_metrics(run)
