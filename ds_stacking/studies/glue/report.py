"""The report of fine-tuning on GLUE: one table beside the published rows, and the files for the official server.

Ours are measured once, on sets that no setting was chosen on; the notes say what was chosen, on what, from how many.
"""

from __future__ import annotations

import math
import statistics
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from ds_stacking.common.files import whole_file, write_json, write_text
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside, read_inside
from ds_stacking.common.words import plain
from ds_stacking.reports.table import markdown
from ds_stacking.studies.glue.choice import Choice
from ds_stacking.studies.glue.results import read_choices
from ds_stacking.studies.glue.rows import ARMS, Row, other_finals, read_scored, summarise

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
SETS = {"dev": "the development sets", "test": "the labelled test sets"}
SUBMITTED = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX")
"""Files of a complete submission to gluebenchmark.com."""


@dataclass(frozen=True, kw_only=True)
class GlueReport:
    """What was measured."""

    rows: list[Row]
    """By task in GLUE's order, then by arm; where test files have labels, those of dev first."""
    failed: dict[str, str]
    """Trainings that failed: name -> why."""
    text: str
    """The report as Markdown."""


def write_glue_report(folder: str | Path, jobs: Sequence[str]) -> GlueReport:
    """Write report/glue.md and report/glue.json of the trainings named `jobs`.

    Raises UserError where a result is missing or damaged, RunFailed where the report cannot be written.
    """
    folder = Path(folder)
    results = {name: read_scored(folder, name) for name in jobs}
    failed = {name: plain(result["failed"]) for name, result in results.items() if "failed" in result}
    done = {name: result for name, result in results.items() if name not in failed}
    rows = summarise(done, read_choices(folder))
    kinds = [kind for kind in SETS if any(row.sets == kind for row in rows)]
    tables = [part for kind in reversed(kinds) for part in _part(kind, [row for row in rows if row.sets == kind])]
    notes = [
        *_notes(rows),
        *_choices(rows, other_finals(folder, rows)),
        *(f"FAILED {a}: {b}" for a, b in failed.items()),
    ]
    text = "\n\n".join([*tables, *notes])
    target = folder / "report"
    content = {"rows": [asdict(row) for row in rows], "failed": failed, "published": PUBLISHED}
    with writing(target):
        make_inside(folder, "report")
        write_text(target / "glue.md", f"# GLUE\n\n{text}\n", inside=folder)
        write_json(target / "glue.json", content, inside=folder)
    return GlueReport(rows=rows, failed=failed, text=text)


def _part(kind: str, rows: Sequence[Row]) -> list[str]:
    """A table, its title and how the model stands to the others there."""
    return [f"Ours on {SETS[kind]}:", _table(rows), *_comparisons(rows)]


def _cell(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def _table(rows: Sequence[Row]) -> str:
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
    return markdown(table)


def _measured(row: Row | None) -> str:
    """Median over seeds, and with more than one the range of the score."""
    if row is None:
        return "-"
    spread = f" ({row.scores[0]:.1f} to {row.scores[-1]:.1f})" if len(row.scores) > 1 else ""
    return _cell(row.median) + spread


def average(published: Mapping[str, Sequence[float]], tasks: Iterable[str]) -> float:
    """GLUE's average: the mean over tasks of the mean of a task's figures."""
    return statistics.fmean(statistics.fmean(published[task]) for task in tasks)


def _notes(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    seeds = max(len(row.scores) for row in rows)
    return [
        f"Ours: percent, at the end of trainings on the whole training set, median of {seeds} seed(s), in brackets "
        "the lowest and highest score (the mean of a task's figures). Published (Gong et al. 2019): percent on the "
        "hidden test sets, one seed; their averages over all nine tasks, 78.3 and 78.4, count WNLI as 65.1, the most "
        "frequent class. The average row takes the same tasks in every column."
    ]


def _choices(rows: Sequence[Row], others: Mapping[tuple[str, str], int]) -> list[str]:
    """What was chosen, on what, from how many, and how often the reported sets were scored."""
    notes = []
    for row in {(row.task, row.arm): row for row in rows}.values():
        setting = ", ".join(f"{name} {value:g}" for name, value in row.setting.items())
        if row.choice and row.choice["examples"]:
            best = max(score for _, score in row.choice["scores"] if score is not None)
            notes.append(
                f"{row.task}, {ARMS[row.arm]}: {setting}; chosen of {len(row.choice['scores'])} settings by the mean "
                f"score, {best:.1f}, of {row.choice['seeds']} training(s) of each on {row.choice['examples']:,} "
                "examples held out of the training set. Then scored once on what is reported, each seed."
                f"{_at_edge(row.choice)}"
            )
        else:
            notes.append(f"{row.task}, {ARMS[row.arm]}: {setting}; no other setting was asked for.")
        if count := others.get((row.task, row.arm)):
            notes[-1] += f" Other commands have scored {count} more setting(s) there, in this folder."
    return notes


def _at_edge(choice: Choice) -> str:
    """Which chosen values are the smallest or largest of those tried, so that better ones may lie beyond."""
    tried = {name: {setting[name] for setting, _ in choice["scores"] if name in setting} for name in choice["setting"]}
    edge = [
        f"{name} {value:g}"
        for name, value in choice["setting"].items()
        if len(tried[name]) > 1 and value in (min(tried[name]), max(tried[name]))
    ]
    return f" At the edge of what was tried: {', '.join(edge)}; a better one may lie beyond." if edge else ""


def _comparisons(rows: Sequence[Row]) -> list[str]:
    """How the model stands to each other arm, task by task: ranges over seeds, and the chance of the draw of a set."""
    notes = []
    for row in rows:
        model = next((other for other in rows if other.task == row.task and other.arm == "model"), None)
        if model is None or row is model:
            continue
        gap = statistics.median(model.scores) - statistics.median(row.scores)
        apart = model.scores[0] > row.scores[-1] or row.scores[0] > model.scores[-1]
        notes.append(
            f"{row.task}: this model is {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} {ARMS[row.arm]!r}; "
            f"the ranges over seeds {'do not overlap' if apart else 'overlap'}{_of_the_draw(row)}."
        )
    return notes


def _of_the_draw(row: Row) -> str:
    """One standard error of an accuracy on so many examples; seeds say nothing of it. Nothing for other figures."""
    if METRICS[row.task] != "accuracy" or not row.examples:
        return ""
    share = min(max(statistics.median(row.scores) / 100, 0.0), 1.0)
    error = 100 * math.sqrt(share * (1 - share) / row.examples)
    return f", and an accuracy on {row.examples:,} examples has a standard error of {error:.1f}"


def write_submission(folder: str | Path, report: GlueReport) -> str:
    """Write submission.zip for the official server from each task's first seed; returns a sentence about it.

    The first, since to take the best by the development set would be to choose on it.
    """
    folder = Path(folder)
    found: dict[str, bytes] = {}
    for row in report.rows:
        for name in SUBMITTED if row.arm == "model" else ():
            with suppress(FileNotFoundError):
                found[name] = read_inside(folder, f"predictions/{row.first}/{name}.tsv")
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
    return f"{path} holds the predictions of each task's first seed{lacks}."
