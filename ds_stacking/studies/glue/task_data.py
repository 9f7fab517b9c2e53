"""The data of a GLUE task, from a folder with GLUE's original TSV files or from the hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import shown
from ds_stacking.data.sources.text_files import first_line
from ds_stacking.studies.glue.tasks import HUB_DATA, Task

HIGHEST_SCORE = 5.0
"""Largest label of a task that predicts a score."""
LONGEST_LINE = 1 << 20
LARGEST_FILE = 1 << 30
"""Bytes of a line and of a file, at most; GLUE's largest file has 80 MB."""
TOLERATED_TORN = (10, 0.01)
"""Torn lines that are left out of a file: so many, or this share of its lines. GLUE's own QQP has 24 in 363,870."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One split."""

    texts: tuple[list[str], ...]
    """One list of sentences, or the two lists of a task on pairs."""
    labels: list[float] = field(default_factory=list)
    """Numbers of the classes, or scores; none in a test set, unless its labels were asked for."""
    ids: list[str] = field(default_factory=list)
    """What the official server calls each row of a test set."""

    def __len__(self) -> int:
        return len(self.texts[0])


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """All splits of a task."""

    train: Examples
    dev: dict[str, Examples]
    """Development sets by their name in Task.dev."""
    test: dict[str, Examples]
    """Test sets by their name in a submission; those that are not there are left out."""
    notes: list[str]
    """What was left out, a sentence for each file."""


NEVER_LABELLED = "AX"
"""The diagnostic set, which another task's model answers."""


def load_task(task: Task, source: str, *, test_labels: bool = False) -> TaskData:
    """Read a task from a folder (`source`/RTE/train.tsv and so on) or from the hub's data set `source`.

    With `test_labels` the test files must have labels too. Raises UserError for what is missing or wrong; torn lines
    of train and dev are left out and noted.
    """
    if os.path.isdir(source):
        return _from_folder(task, Path(source), test_labels)
    if os.path.lexists(source):
        raise UserError(f"--data {shown(source)} is no folder; give a folder with GLUE's tasks, or a hub name.")
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", source):
        raise UserError(
            f"The folder {shown(source)} does not exist; give --data a folder with GLUE's tasks, or a hub name."
        )
    if test_labels:
        raise UserError("The hub's test sets have no labels; leave --test_labels out, or give --data a folder.")
    return _from_hub(task, source)


def _from_folder(task: Task, root: Path, test_labels: bool) -> TaskData:
    folder = root / task.name
    if not folder.is_dir():
        raise UserError(f"{root} has no folder {task.name}; add it, or leave {task.name} out of --tasks.")
    notes: list[str] = []
    labelled = {"train.tsv", *(file for file, _ in task.dev.values())}
    for file in sorted(labelled):
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}; add it, or leave {task.name} out of --tasks.")
    tests = {name: folder / file for name, (file, _) in task.test.items()}
    missing = [name for name, path in tests.items() if not path.is_file()]
    if test_labels and any(name != NEVER_LABELLED for name in missing):
        raise UserError(f"--test_labels: {tests[missing[0]]} is missing; add it, or leave --test_labels out.")
    if missing:
        notes.append(f"{task.name}: no test file for {', '.join(missing)}, so nothing to submit for it.")
    return TaskData(
        train=read_tsv(folder / "train.tsv", task, notes),
        dev={name: read_tsv(folder / file, task, notes) for name, (file, _) in task.dev.items()},
        test={
            name: read_tsv(path, task, notes, test=True, labelled=test_labels and name != NEVER_LABELLED)
            for name, path in tests.items()
            if path.is_file()
        },
        notes=notes,
    )


def read_tsv(
    path: Path, task: Task, notes: list[str], *, test: bool = False, labelled: bool | None = None
) -> Examples:
    """Read one of GLUE's TSV files: fields are split at tabs, quotes are ordinary characters.

    All but the test sets have labels, unless `labelled` says otherwise.

    A line with too few or too many fields is left out, with a note; in a test set, where every row counts, and
    where there are many it raises UserError.
    """
    lines = _lines(path)
    header = list(task.header or ()) if not test else []
    if not header:
        header = next(lines, (1, ""))[1].split("\t")
    labelled = not test if labelled is None else labelled
    wanted = [*task.columns, *((task.label_column,) if labelled else ())]
    for column in wanted:
        if header.count(column) != 1:
            problem = "names twice the column" if column in header else "has no column"
            raise UserError(
                f"{path} {problem} {column!r}; its first line must name the columns of GLUE's file, each once"
                + (", and with --test_labels that of the labels." if test and labelled else ".")
            )
    rows: list[list[str]] = []
    labels: list[float] = []
    torn, count = [], 0
    for number, line in lines:
        count += 1
        fields = line.split("\t")
        if len(fields) != len(header):
            torn.append(number)
            continue
        row = dict(zip(header, fields, strict=True))
        rows.append([row[column] for column in task.columns] + [_id(row, len(rows))])
        if labelled:
            labels.append(_label(row[task.label_column], task, f"{path} line {number}"))
    if torn:
        notes.append(_check_torn(path, torn, count, test=test))
    if not rows:
        raise UserError(f"{path} holds no examples; restore the file.")
    *texts, ids = (list(column) for column in zip(*rows, strict=True))
    return Examples(texts=tuple(texts), labels=labels, ids=ids if test else [])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank, one in memory at a time. Raises UserError."""
    # Only these end a line: str.splitlines would also cut at characters that occur inside sentences.
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                raw = file.readline(LONGEST_LINE + 1)
                if not raw:
                    return
                if len(raw) > LONGEST_LINE or file.tell() > LARGEST_FILE:
                    what = f"line {number} of {path} has" if len(raw) > LONGEST_LINE else f"{path} has"
                    most = LONGEST_LINE if len(raw) > LONGEST_LINE else LARGEST_FILE
                    raise UserError(f"{what} more than {most:,} bytes, which is none of GLUE's; restore the file.")
                if line := _text(path, number, raw):
                    yield number, line
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that, or restore the file.") from None


def _text(path: Path, number: int, raw: bytes) -> str:
    """A line as text without its end; empty for a blank one."""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} line {number} is no UTF-8 text ({error.reason} at byte {error.start}); restore the file."
        ) from None
    if "\0" in line:
        raise UserError(f"{path} line {number} holds a NUL, which no text does; restore the file.")
    line = line.removesuffix("\n").removesuffix("\r")
    return line if line.strip() else ""


def _id(row: dict[str, str], position: int) -> str:
    return row.get("index", row.get("id", str(position)))


def _label(text: str, task: Task, where: str) -> float:
    if task.regression:
        try:
            score = float(text)
        except ValueError:
            score = -1.0
        if not 0 <= score <= HIGHEST_SCORE:
            raise UserError(
                f"{where}: the score {shown(text)} is no number from 0 to {HIGHEST_SCORE:g}; mend the line."
            )
        return score
    if text not in task.labels:
        raise UserError(f"{where}: the label {shown(text)} is none of {', '.join(task.labels)}; mend the line.")
    return task.labels.index(text)


def _check_torn(path: Path, torn: Sequence[int], lines: int, *, test: bool) -> str:
    what = f"{path}: {len(torn)} of {lines} lines, the first of them line {torn[0]}, with too few or too many fields"
    if test:
        raise UserError(f"{what}; a submission needs every row, so restore GLUE's file.")
    number, share = TOLERATED_TORN
    if len(torn) > max(number, share * lines):
        raise UserError(f"{what}; restore GLUE's file.")
    return f"{what}: left out."


def _from_hub(task: Task, name: str) -> TaskData:
    splits = _load_hub(name, task.hub)
    others = {"AX": _load_hub(name, "ax")} if "AX" in task.test else {}
    try:
        return TaskData(
            train=_convert(splits["train"], task),
            dev={key: _convert(splits[split], task) for key, (_, split) in task.dev.items()},
            test={
                key: _convert(others.get(key, splits)[split], task, test=True) for key, (_, split) in task.test.items()
            },
            notes=[],
        )
    except KeyError as error:
        raise UserError(
            f"The hub's {name!r} has no {error} for {task.name}; give --data {HUB_DATA} or a folder."
        ) from None


def _load_hub(name: str, config: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config)
    except Exception as error:  # no network, no such data set, a broken cache: each a class of its own
        raise UserError(
            f"GLUE's {config} cannot be loaded from the hub's {name!r} ({first_line(error)}); "
            f"give --data a folder with GLUE's TSV files."
        ) from error


def _convert(rows: Any, task: Task, *, test: bool = False) -> Examples:
    """One split of the hub's data set, whose test labels are all -1."""
    for column in task.hub_columns:
        if column not in rows.column_names:
            raise KeyError(column)
    texts = tuple(list(rows[column]) for column in task.hub_columns)
    if test:
        return Examples(texts=texts, ids=[str(index) for index in rows["idx"]])
    labels = [float(label) for label in rows["label"]]
    highest = HIGHEST_SCORE if task.regression else len(task.labels) - 1
    wrong = next((row for row, label in enumerate(labels) if not 0 <= label <= highest), None)
    if wrong is not None:
        raise UserError(
            f"Row {wrong} of the hub's {task.hub} has the label {labels[wrong]:g}; it must be 0 to {highest:g}."
        )
    return Examples(texts=texts, labels=labels)
