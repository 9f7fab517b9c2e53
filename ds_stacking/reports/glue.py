"""The report of fine-tuning on GLUE: one table beside the published rows, and the files for the official server.

Reads the results folder that launchers/finetune_glue.py writes, one JSON file for each training.
"""

from __future__ import annotations

import io
import statistics
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import whole_file, write_json, write_text
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside, read_inside
from ds_stacking.common.words import plain

PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "BERT-Base": {
        "CoLA": (52.1,),
        "SST-2": (93.5,),
        "MRPC": (88.9, 84.8),
        "STS-B": (87.1, 85.8),
        "QQP": (71.2, 89.2),
        "MNLI": (84.6, 83.4),
        "QNLI": (90.5,),
        "RTE": (66.4,),
        "WNLI": (65.1,),
    },
    "Stacking": {
        "CoLA": (56.2,),
        "SST-2": (93.9,),
        "MRPC": (88.2, 83.9),
        "STS-B": (84.2, 82.5),
        "QQP": (70.4, 88.7),
        "MNLI": (84.4, 84.2),
        "QNLI": (90.1,),
        "RTE": (67.0,),
        "WNLI": (65.1,),
    },
}
"""Rows of Gong et al. 2019, from the official server; WNLI is the most frequent class."""
METRICS = {
    "CoLA": "Matthews",
    "SST-2": "accuracy",
    "MRPC": "F1 / accuracy",
    "STS-B": "Pearson / Spearman",
    "QQP": "F1 / accuracy",
    "MNLI": "accuracy m / mm",
    "QNLI": "accuracy",
    "RTE": "accuracy",
    "WNLI": "accuracy",
}
"""What the figures of a cell are, in GLUE's order of tasks."""
ARMS = {"model": "this model", "untrained": "same, untrained", "bag_of_words": "bag of words"}
SUBMITTED = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX")
"""Files of a complete submission to gluebenchmark.com."""
Result = Mapping[str, Any]
Percent = Annotated[float, Field(allow_inf_nan=False, ge=-100.1, le=100.1)]
Setting = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e39)]


class Saved(TypedDict):
    """results/<training>.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    task: str
    arm: str
    epochs: Setting
    batch_size: Setting
    lr: Setting
    scores: NotRequired[dict[str, dict[str, Percent]]]
    failed: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one task, at the best setting that was tried."""

    task: str
    """The task's name."""
    arm: str
    """model, untrained or bag_of_words."""
    median: tuple[float, ...]
    """Median over seeds of each figure of the cell."""
    scores: list[float]
    """The task's score (mean of its figures) for each seed, ascending."""
    setting: dict[str, float]
    """Epochs, batch size and learning rate."""
    tried: int
    """Settings that were tried; above 1, the best was chosen by this very figure."""
    best: str
    """The training with the highest score: its predictions are submitted."""


@dataclass(frozen=True, kw_only=True)
class GlueReport:
    """What was measured."""

    rows: list[Row]
    """By task in GLUE's order, then by arm."""
    failed: dict[str, str]
    """Trainings that failed: name -> why."""
    text: str
    """The report as Markdown."""


def write_glue_report(folder: str | Path, jobs: Sequence[str]) -> GlueReport:
    """Write report/glue.md and report/glue.json of the trainings named `jobs`.

    Raises UserError where a result is missing or damaged, RunFailed where the report cannot be written.
    """
    folder = Path(folder)
    results = {name: _read(folder, name) for name in jobs}
    failed = {name: plain(result["failed"]) for name, result in results.items() if "failed" in result}
    rows = summarise({name: result for name, result in results.items() if name not in failed})
    text = "\n\n".join(part for part in (_table(rows), *_notes(rows, failed)) if part)
    target = folder / "report"
    content = {"rows": [asdict(row) for row in rows], "failed": failed, "published": PUBLISHED}
    with writing(target):
        make_inside(folder, "report")
        write_text(target / "glue.md", f"# GLUE\n\n{text}\n", inside=folder)
        write_json(target / "glue.json", content, inside=folder)
    return GlueReport(rows=rows, failed=failed, text=text)


def _read(folder: Path, name: str) -> Result:
    path, mend = folder / "results" / f"{name}.json", "delete it, and the same command does that training again"
    try:
        result = cast(Result, read_json(path, Saved, mend=mend, inside=folder))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the same command again.") from None
    figures = len(PUBLISHED["BERT-Base"].get(result["task"], ()))
    if "failed" not in result and (not figures or len(_figures(result)) != figures):
        raise UserError(f"{path} does not hold the figures of a task of GLUE; {mend}.")
    return result


def summarise(results: Mapping[str, Result]) -> list[Row]:
    """One row for each task and arm: the setting with the highest median score over its seeds."""
    groups: dict[tuple[str, str], dict[tuple, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, result in results.items():
        setting = (result["epochs"], result["batch_size"], result["lr"])
        groups[result["task"], result["arm"]][setting].append(name)
    rows = []
    for task in METRICS:
        for arm in ARMS:
            if settings := groups.get((task, arm)):
                candidates = [_row(task, arm, setting, names, results) for setting, names in settings.items()]
                rows.append(max(candidates, key=lambda row: statistics.median(row.scores)))
                rows[-1] = Row(**{**vars(rows[-1]), "tried": len(candidates)})
    return rows


def _row(task: str, arm: str, setting: tuple, names: Sequence[str], results: Mapping[str, Result]) -> Row:
    figures = {name: _figures(results[name]) for name in names}
    scores = {name: statistics.fmean(values) for name, values in figures.items()}
    return Row(
        task=task,
        arm=arm,
        median=tuple(statistics.median(column) for column in zip(*figures.values(), strict=True)),
        scores=sorted(scores.values()),
        setting=dict(zip(("epochs", "batch_size", "lr"), setting, strict=True)),
        tried=1,
        best=max(scores, key=lambda name: scores[name]),
    )


def _figures(result: Result) -> list[float]:
    """All metrics of all development sets, in order."""
    return [value for metrics in result.get("scores", {}).values() for value in metrics.values()]


def _cell(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    arms = [arm for arm in ARMS if any(row.arm == arm for row in rows)]
    tasks = [task for task in METRICS if any(row.task == task for row in rows)]
    by_key = {(row.task, row.arm): row for row in rows}
    table = Table(box=box.MARKDOWN)
    for header in ("task", "figures", *(ARMS[arm] for arm in arms), *PUBLISHED):
        table.add_column(header, justify="left" if header in ("task", "figures") else "right", no_wrap=True)
    for task in tasks:
        cells = [_measured(by_key.get((task, arm))) for arm in arms]
        table.add_row(task, METRICS[task], *cells, *(_cell(published[task]) for published in PUBLISHED.values()))
    averages = []
    for arm in arms:
        scores = [statistics.median(by_key[task, arm].scores) for task in tasks if (task, arm) in by_key]
        averages.append(f"{statistics.fmean(scores):.1f}" if len(scores) == len(tasks) else "-")
    published_averages = [f"{average(published, tasks):.1f}" for published in PUBLISHED.values()]
    table.add_row("average", f"{len(tasks)} of {len(METRICS)} tasks", *averages, *published_averages)
    text = io.StringIO()
    Console(file=text, width=300, color_system=None).print(table)
    return "\n".join(line.strip() for line in text.getvalue().strip().splitlines())


def _measured(row: Row | None) -> str:
    """Median over seeds, and with more than one the range of the score."""
    if row is None:
        return "-"
    spread = f" ({row.scores[0]:.1f} to {row.scores[-1]:.1f})" if len(row.scores) > 1 else ""
    return _cell(row.median) + spread


def average(published: Mapping[str, Sequence[float]], tasks: Iterable[str]) -> float:
    """GLUE's average: the mean over tasks of the mean of a task's figures."""
    return statistics.fmean(statistics.fmean(published[task]) for task in tasks)


def _notes(rows: Sequence[Row], failed: Mapping[str, str]) -> list[str]:
    notes = []
    if rows:
        seeds = max(len(row.scores) for row in rows)
        notes.append(
            f"Ours: percent on the development sets at the end of training, median of {seeds} seed(s), in brackets "
            "the lowest and highest score (the mean of a task's figures). Published (Gong et al. 2019): percent on "
            "the hidden test sets, one seed; their averages over all nine tasks, 78.3 and 78.4, count WNLI as 65.1, "
            "the most frequent class. The average row takes the same tasks in every column."
        )
    grids = {row.tried for row in rows if row.tried > 1}
    if grids:
        notes.append(
            f"Of {max(grids)} settings each cell shows the best, chosen on the development set that it is measured "
            "on, so it is somewhat too high."
        )
    notes += _comparisons(rows)
    notes += [f"FAILED {name}: {why}" for name, why in failed.items()]
    return notes


def _comparisons(rows: Sequence[Row]) -> list[str]:
    """How the model stands to each other arm, task by task, by ranges over seeds."""
    notes = []
    for row in rows:
        model = next((other for other in rows if other.task == row.task and other.arm == "model"), None)
        if model is None or row is model:
            continue
        gap = statistics.median(model.scores) - statistics.median(row.scores)
        apart = model.scores[0] > row.scores[-1] or row.scores[0] > model.scores[-1]
        notes.append(
            f"{row.task}: this model is {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} {ARMS[row.arm]!r}; "
            f"the ranges over seeds {'do not overlap' if apart else 'overlap'}."
        )
    return notes


def write_submission(folder: str | Path, report: GlueReport) -> str:
    """Write submission.zip for the official server from each task's best seed; returns a sentence about it."""
    folder = Path(folder)
    found: dict[str, bytes] = {}
    for row in report.rows:
        for name in SUBMITTED if row.arm == "model" else ():
            with suppress(FileNotFoundError):
                found[name] = read_inside(folder, f"predictions/{row.best}/{name}.tsv")
    if not found:
        return "No test sets, so no submission."
    path = folder / "submission.zip"
    with (
        writing(path),
        whole_file(path, inside=folder) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, answers in found.items():
            archive.writestr(f"{name}.tsv", answers)
    missing = [name for name in SUBMITTED if name not in found]
    lacks = f"; the server also wants {', '.join(missing)}" if missing else ""
    return f"{path} holds the predictions of each task's best seed{lacks}."
