"""The table of GLUE: medians, ranges, what was chosen and on what, the published averages, the submission."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.studies.glue.report import METRICS, PUBLISHED, average, write_glue_report, write_submission


def write(folder: Path, task: str, arm: str, seed: int, lr: float, **content: object) -> str:
    name = f"{task}-{arm}-{lr}-{seed}"
    (folder / "results").mkdir(exist_ok=True)
    record = {"task": task, "arm": arm, "choosing": False, "epochs": 3, "batch_size": 16, "lr": lr, "seed": seed}
    record |= content
    (folder / "results" / f"{name}.json").write_text(json.dumps(record))
    return name


def scores(**metrics: float) -> dict:
    return {"scores": {"dev": metrics}}


def test_the_published_rows_give_the_published_averages() -> None:
    """With WNLI at 65.1, as the published averages count it; without it they would be higher."""
    assert round(average(PUBLISHED["BERT-Base"], METRICS), 1) == 78.3
    assert round(average(PUBLISHED["Stacking"], METRICS), 1) == 78.4
    assert round(average(PUBLISHED["BERT-Base"], [task for task in METRICS if task != "WNLI"]), 1) == 80.0


def choose(folder: Path, task: str, arm: str, tried: dict[float, float | None], *, chosen: float) -> dict:
    """choices.json gets one more: rate -> mean score on the part of the training set."""
    path = folder / "choices.json"
    choices = json.loads(path.read_text())["choices"] if path.exists() else []
    settings = [({"epochs": 3, "batch_size": 16, "lr": rate}, score) for rate, score in tried.items()]
    (setting,) = (one for one, _ in settings if one["lr"] == chosen)
    choices.append({"task": task, "arm": arm, "setting": setting, "examples": 692, "seeds": 3, "scores": settings})
    path.write_text(json.dumps({"choices": choices}))
    return setting


def test_the_table_shows_medians_ranges_and_what_was_chosen(tmp_path: Path) -> None:
    names = [write(tmp_path, "SST-2", "model", s, 1e-5, **scores(accuracy=a)) for s, a in enumerate((81, 80, 85))]
    # what was tried for the choice stands in no cell, however high it is
    names += [write(tmp_path, "SST-2", "model", 1001, 1e-3, choosing=True, scores={"held_out": {"accuracy": 99}})]
    names += [write(tmp_path, "SST-2", "untrained", s, 1e-5, **scores(accuracy=a)) for s, a in enumerate((70, 79, 72))]
    names += [write(tmp_path, "MRPC", "model", s, 1e-5, **scores(f1=f, accuracy=60)) for s, f in enumerate((90, 70))]
    names += [write(tmp_path, "MRPC", "untrained", 0, 1e-5, failed="RuntimeError: not finite")]
    setting = choose(tmp_path, "SST-2", "model", {1e-5: 83.25, 1e-3: 82.0, 1.0: None}, chosen=1e-5)
    report = write_glue_report(tmp_path, names)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.text.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) > 2}
    assert rows["SST-2"] == ["accuracy", "81.0 (80.0 to 85.0)", "72.0 (70.0 to 79.0)", "93.5", "93.9"]
    assert rows["MRPC"] == ["F1 / accuracy", "80.0 / 60.0 (65.0 to 75.0)", "-", "88.9 / 84.8", "88.2 / 83.9"]
    assert rows["average"] == ["2 of 9 tasks", "75.5", "-", "90.2", "90.0"]
    assert "9.0 points above 'same, untrained'; the ranges over seeds do not overlap" in report.text
    said = "epochs 3, batch_size 16, lr 1e-05; chosen of 3 settings by the mean score, 83.2, of 3 training(s) of each"
    assert f"SST-2, this model: {said} on 692 examples held out of the training set. Then scored once" in report.text
    assert "SST-2, same, untrained: epochs 3, batch_size 16, lr 1e-05; no other setting was asked for" in report.text
    assert report.failed == {names[-1]: "RuntimeError: not finite"} and "not finite" in report.text
    row = json.loads((tmp_path / "report" / "glue.json").read_text())["rows"][0]
    assert row["setting"] == setting and row["first"] == names[0] and row["choice"]["examples"] == 692


@pytest.mark.parametrize(("chosen", "is_edge"), [(1e-5, True), (1e-4, False), (1e-3, True)])
def test_a_choice_at_the_edge_of_what_was_tried_is_said(tmp_path: Path, chosen: float, is_edge: bool) -> None:
    names = [write(tmp_path, "SST-2", "model", seed, chosen, **scores(accuracy=80)) for seed in (1, 2)]
    choose(tmp_path, "SST-2", "model", {1e-5: 80.0, 1e-4: 81.0, 1e-3: 79.0}, chosen=chosen)
    said = f"At the edge of what was tried: lr {chosen:g}; a better one may lie beyond."
    assert (said in write_glue_report(tmp_path, names).text) == is_edge, "the epochs had one value only"


def test_settings_that_other_commands_scored_are_counted(tmp_path: Path) -> None:
    names = [write(tmp_path, "RTE", "model", 1, 1e-5, **scores(accuracy=60))]
    write(tmp_path, "RTE", "model", 1001, 1e-2, choosing=True, scores={"held_out": {"accuracy": 99}})
    assert "Other commands" not in write_glue_report(tmp_path, names).text
    for rate in (1e-4, 1e-3):
        for seed in (1, 2):
            write(tmp_path, "RTE", "model", seed, rate, **scores(accuracy=61))
    assert "Other commands have scored 2 more setting(s) there" in write_glue_report(tmp_path, names).text


def test_labelled_test_sets_have_a_table_of_their_own(tmp_path: Path) -> None:
    both = [
        {"scores": {"dev": {"accuracy": a}}, "test_scores": {"SST-2": {"accuracy": b}}}
        for a, b in ((81, 70), (80, 71))
    ]
    sizes = {"dev": 872, "SST-2": 1821}
    names = [write(tmp_path, "SST-2", "model", seed, 1e-3, **one, examples=sizes) for seed, one in enumerate(both)]
    names += [write(tmp_path, "SST-2", "naive_bayes", 0, 0.0, **both[0], examples=sizes, epochs=0, batch_size=0)]
    report = write_glue_report(tmp_path, names)
    test, dev = report.text.split("Ours on the development sets:")
    assert test.startswith("Ours on the labelled test sets:") and "70.5 (70.0 to 71.0)" in test
    assert "80.5 (80.0 to 81.0)" in dev and "naive-Bayes weights" in test
    for part, share, size, words in ((test, 0.7, 1821, "1,821"), (dev, 0.81, 872, "872")):
        error = 100 * (share * (1 - share) / size) ** 0.5
        assert f"an accuracy on {words} examples has a standard error of {error:.1f}." in part
    assert [(row.sets, row.examples) for row in report.rows if row.arm == "model"] == [("dev", 872), ("test", 1821)]


def test_the_submission_holds_the_first_seed_and_not_the_best(tmp_path: Path) -> None:
    names = [write(tmp_path, "RTE", "model", s, 3e-5, **scores(accuracy=a)) for s, a in ((2, 66), (10, 70), (1, 60))]
    for name in names:
        (tmp_path / "predictions" / name).mkdir(parents=True)
        (tmp_path / "predictions" / name / "RTE.tsv").write_text(f"index\tprediction\n0\t{name}\n")
    text = write_submission(tmp_path, write_glue_report(tmp_path, names))
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["RTE.tsv"]
        assert names[2] in archive.read("RTE.tsv").decode()
    assert "CoLA" in text and "RTE" not in text
    empty = write_glue_report(tmp_path, [])
    assert write_submission(tmp_path, empty) == "No test sets, so no submission." and empty.text == ""


def test_ranges_that_touch_are_said_to_overlap(tmp_path: Path) -> None:
    names = [write(tmp_path, "RTE", "model", s, 3e-5, **scores(accuracy=a)) for s, a in enumerate((60, 66))]
    names += [write(tmp_path, "RTE", "bag_of_words", 1, 3e-5, **scores(accuracy=62))]
    assert "the ranges over seeds overlap" in write_glue_report(tmp_path, names).text
    with pytest.raises(UserError, match="RTE-never-run.json is missing"):
        write_glue_report(tmp_path, ["RTE-never-run"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null", "is damaged"),
        ('{"task": "RTE"}', "arm: field required"),
        ({"scores": {"dev": {"accuracy": 1e300}}}, "scores.dev.accuracy"),
        ({"scores": {}}, "does not hold the figures of a task"),
        ({"task": "SQuAD"}, "does not hold the figures of a task"),
        ({"lr": -1}, "lr: input should be greater than or equal to 0"),
        ({"choosing": None}, "choosing: input should be a valid boolean"),
        ({"test_scores": {"RTE": {"accuracy": 1e300}}}, "test_scores.RTE.accuracy"),
    ],
)
def test_a_damaged_result_is_one_sentence(tmp_path: Path, content: object, message: str) -> None:
    good = {
        "task": "RTE",
        "arm": "model",
        "choosing": False,
        "epochs": 1,
        "batch_size": 1,
        "lr": 1e-3,
        "seed": 1,
        "scores": {"dev": {"accuracy": 50}},
    }
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "a.json"
    path.write_text(json.dumps(good))
    assert write_glue_report(tmp_path, ["a"]).rows
    path.write_text(content if isinstance(content, str) else json.dumps(good | content))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        write_glue_report(tmp_path, ["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("null", "choices.json is damaged"), ('{"choices": [{"task": "RTE"}]}', "choices.0.arm: field required")],
)
def test_damaged_choices_are_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    names = [write(tmp_path, "RTE", "model", 1, 3e-5, **scores(accuracy=60))]
    (tmp_path / "choices.json").write_text(content)
    with pytest.raises(UserError, match=message):
        write_glue_report(tmp_path, names)


def test_reports_and_submissions_are_written_through_no_link(tmp_path: Path) -> None:
    good = {
        "task": "RTE",
        "arm": "model",
        "choosing": False,
        "epochs": 1,
        "batch_size": 1,
        "lr": 1e-3,
        "seed": 1,
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
