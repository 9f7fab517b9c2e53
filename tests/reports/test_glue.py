"""The table of GLUE: medians, ranges, the best setting, the published averages, the submission."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.reports.glue import METRICS, PUBLISHED, average, write_glue_report, write_submission


def write(folder: Path, task: str, arm: str, seed: int, lr: float, **content: object) -> str:
    name = f"{task}-{arm}-{lr}-{seed}"
    (folder / "results").mkdir(exist_ok=True)
    record = {"task": task, "arm": arm, "epochs": 3, "batch_size": 16, "lr": lr, "seed": seed, **content}
    (folder / "results" / f"{name}.json").write_text(json.dumps(record))
    return name


def scores(**metrics: float) -> dict:
    return {"scores": {"dev": metrics}}


def test_the_published_rows_give_the_published_averages() -> None:
    """With WNLI at 65.1, as the published averages count it; without it they would be higher."""
    assert round(average(PUBLISHED["BERT-Base"], METRICS), 1) == 78.3
    assert round(average(PUBLISHED["Stacking"], METRICS), 1) == 78.4
    assert round(average(PUBLISHED["BERT-Base"], [task for task in METRICS if task != "WNLI"]), 1) == 80.0


def test_the_table_shows_medians_ranges_and_the_best_setting(tmp_path: Path) -> None:
    names = [write(tmp_path, "SST-2", "model", s, 1e-5, **scores(accuracy=a)) for s, a in enumerate((81, 80, 85))]
    names += [write(tmp_path, "SST-2", "model", s, 1e-3, **scores(accuracy=a)) for s, a in enumerate((50, 99, 51))]
    names += [write(tmp_path, "SST-2", "untrained", s, 1e-5, **scores(accuracy=a)) for s, a in enumerate((70, 79, 72))]
    names += [write(tmp_path, "MRPC", "model", s, 1e-5, **scores(f1=f, accuracy=60)) for s, f in enumerate((90, 70))]
    names += [write(tmp_path, "MRPC", "untrained", 0, 1e-5, failed="RuntimeError: not finite")]
    report = write_glue_report(tmp_path, names)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.text.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) > 2}
    assert rows["SST-2"] == ["accuracy", "81.0 (80.0 to 85.0)", "72.0 (70.0 to 79.0)", "93.5", "93.9"]
    assert rows["MRPC"] == ["F1 / accuracy", "80.0 / 60.0 (65.0 to 75.0)", "-", "88.9 / 84.8", "88.2 / 83.9"]
    assert rows["average"] == ["2 of 9 tasks", "75.5", "-", "90.2", "90.0"]
    assert "9.0 points above 'same, untrained'; the ranges over seeds do not overlap" in report.text
    assert "Of 2 settings" in report.text and "65.1" in report.text
    assert report.failed == {names[-1]: "RuntimeError: not finite"} and "not finite" in report.text
    assert json.loads((tmp_path / "report" / "glue.json").read_text())["rows"][0]["best"] == names[2]


def test_the_submission_holds_the_best_seeds(tmp_path: Path) -> None:
    names = [write(tmp_path, "RTE", "model", s, 3e-5, **scores(accuracy=a)) for s, a in enumerate((60, 66))]
    for name in names:
        (tmp_path / "predictions" / name).mkdir(parents=True)
        (tmp_path / "predictions" / name / "RTE.tsv").write_text(f"index\tprediction\n0\t{name}\n")
    text = write_submission(tmp_path, write_glue_report(tmp_path, names))
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["RTE.tsv"]
        assert names[1] in archive.read("RTE.tsv").decode()
    assert "CoLA" in text and "RTE" not in text
    empty = write_glue_report(tmp_path, [])
    assert write_submission(tmp_path, empty) == "No test sets, so no submission." and empty.text == ""


def test_ranges_that_touch_are_said_to_overlap(tmp_path: Path) -> None:
    names = [write(tmp_path, "RTE", "model", s, 3e-5, **scores(accuracy=a)) for s, a in enumerate((60, 66))]
    names += [write(tmp_path, "RTE", "bag_of_words", 1, 3e-5, **scores(accuracy=62))]
    assert "the ranges over seeds overlap" in write_glue_report(tmp_path, names).text
    with pytest.raises(UserError, match="RTE-never-run.json cannot be read"):
        write_glue_report(tmp_path, ["RTE-never-run"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null", "is damaged"),
        ('{"task": "RTE"}', "arm: field required"),
        ({"scores": {"dev": {"accuracy": 1e300}}}, "scores.dev.accuracy"),
        ({"scores": {}}, "does not hold the figures of a task"),
        ({"task": "SQuAD"}, "does not hold the figures of a task"),
        ({"lr": 0}, "lr: input should be greater than 0"),
    ],
)
def test_a_damaged_result_is_one_sentence(tmp_path: Path, content: object, message: str) -> None:
    good = {
        "task": "RTE",
        "arm": "model",
        "epochs": 1,
        "batch_size": 1,
        "lr": 1e-3,
        "scores": {"dev": {"accuracy": 50}},
    }
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "a.json"
    path.write_text(json.dumps(good))
    assert write_glue_report(tmp_path, ["a"]).rows
    path.write_text(content if isinstance(content, str) else json.dumps(good | content))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        write_glue_report(tmp_path, ["a"])


def test_reports_and_submissions_are_written_through_no_link(tmp_path: Path) -> None:
    good = {
        "task": "RTE",
        "arm": "model",
        "epochs": 1,
        "batch_size": 1,
        "lr": 1e-3,
        "scores": {"dev": {"accuracy": 50}},
    }
    for name in ("results", "predictions/a", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "results" / "a.json").write_text(json.dumps(good))
    (tmp_path / "precious").write_text("precious")
    report = write_glue_report(tmp_path, ["a"])
    (tmp_path / "submission.zip").symlink_to(tmp_path / "precious")
    (tmp_path / "predictions/a/RTE.tsv").write_text("index\tprediction\n")
    assert "holds the predictions" in write_submission(tmp_path, report)
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "predictions/a/RTE.tsv").unlink()
    (tmp_path / "predictions/a/RTE.tsv").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link"):
        write_submission(tmp_path, report)
    shutil.rmtree(tmp_path / "report")
    (tmp_path / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        write_glue_report(tmp_path, ["a"])
    assert not any((tmp_path / "elsewhere").iterdir())
