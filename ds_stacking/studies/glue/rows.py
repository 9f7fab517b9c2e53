"""Rows of the table of GLUE: what the final trainings of a setting scored, and how that setting was chosen.

Reads what launchers/finetune_glue.py leaves: results/, one JSON file for each training, and choices.json.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, read_json

FIGURES = {"CoLA": 1, "SST-2": 1, "MRPC": 2, "STS-B": 2, "QQP": 2, "MNLI": 2, "QNLI": 1, "RTE": 1, "WNLI": 1}
"""Figures of a task's cell, in GLUE's order of tasks."""
ARMS = {
    "model": "this model",
    "untrained": "same, untrained",
    "bag_of_words": "bag of words",
    "naive_bayes": "naive-Bayes weights",
}
"""What is measured, and what a column calls it."""
MEND = "delete it, and the same command does that training again"
Result = Mapping[str, Any]
Percent = Annotated[float, Field(allow_inf_nan=False, ge=-100.1, le=100.1)]
Setting = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e39)]


class Saved(TypedDict):
    """results/<training>.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    task: str
    arm: str
    choosing: bool
    epochs: Setting
    batch_size: Setting
    lr: Setting
    seed: Count
    scores: NotRequired[dict[str, dict[str, Percent]]]
    test_scores: NotRequired[dict[str, dict[str, Percent]]]
    examples: NotRequired[dict[str, Count]]
    failed: NotRequired[str]


class ChoiceSaved(TypedDict):
    """How an arm came to its setting."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    task: str
    arm: str
    setting: dict[str, Finite]
    examples: Count
    seeds: Count
    scores: list[tuple[dict[str, Finite], Percent | None]]


class Choices(TypedDict):
    """choices.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    choices: list[ChoiceSaved]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one task, at the setting that was chosen on a part of the training set."""

    task: str
    """The task's name."""
    arm: str
    """One of ARMS."""
    sets: str
    """dev, or test where the test files have labels."""
    median: tuple[float, ...]
    """Median over seeds of each figure of the cell."""
    scores: list[float]
    """The task's score (mean of its figures) for each seed, ascending."""
    examples: int
    """Examples that a score was taken on; 0 where unknown."""
    setting: dict[str, float]
    """What was chosen: epochs, batch size and learning rate, or a baseline's own."""
    choice: ChoiceSaved | None
    """How."""
    first: str
    """The training with the lowest seed: its predictions are submitted."""


def read_result(folder: Path, name: str) -> Result:
    """One training's result. Raises UserError where it is missing or damaged."""
    path = folder / "results" / f"{name}.json"
    try:
        result = cast(Result, read_json(path, Saved, mend=MEND, inside=folder))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the same command again.") from None
    figures = 1 if result["choosing"] and result["task"] in FIGURES else FIGURES.get(result["task"], 0)
    if "failed" not in result and (not figures or len(_figures(result, "scores")) < figures):
        raise UserError(f"{path} does not hold the figures of a task of GLUE; {MEND}.")
    return result


def read_choices(folder: Path) -> dict[tuple[str, str], ChoiceSaved]:
    """Task and arm -> how its setting was chosen. Raises UserError where the file is damaged."""
    try:
        found = read_json(folder / "choices.json", Choices, mend="give the same command again", inside=folder)
    except FileNotFoundError:
        return {}
    return {(choice["task"], choice["arm"]): choice for choice in found["choices"]}


def summarise(results: Mapping[str, Result], choices: Mapping[tuple[str, str], ChoiceSaved]) -> list[Row]:
    """One row for each task, arm and kind of set, of the final trainings among `results`."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, result in results.items():
        if not result["choosing"]:
            groups[result["task"], result["arm"]].append(name)
    keys = [(task, arm) for task in FIGURES for arm in ARMS if (task, arm) in groups]
    return [
        _row(sets, {name: results[name] for name in groups[key]}, choices.get(key))
        for key in keys
        for sets, scores in (("dev", "scores"), ("test", "test_scores"))
        if results[groups[key][0]].get(scores)
    ]


def _row(sets: str, results: Mapping[str, Result], choice: ChoiceSaved | None) -> Row:
    key = "scores" if sets == "dev" else "test_scores"
    figures = [_figures(result, key) for result in results.values()]
    first = min(results, key=lambda name: results[name]["seed"])
    one = results[first]
    own = {name: one[name] for name in ("epochs", "batch_size", "lr")}
    return Row(
        task=one["task"],
        arm=one["arm"],
        sets=sets,
        median=tuple(statistics.median(column) for column in zip(*figures, strict=True)),
        scores=sorted(statistics.fmean(values) for values in figures),
        examples=sum(one.get("examples", {}).get(name, 0) for name in one[key]),
        setting=choice["setting"] if choice else own,
        choice=choice,
        first=first,
    )


def _figures(result: Result, key: str) -> list[float]:
    """All metrics of all sets, in order."""
    return [value for metrics in result.get(key, {}).values() for value in metrics.values()]


def other_finals(folder: Path, rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    """Task and arm -> settings beside the reported one that other commands have scored in this folder."""
    found: dict[tuple[str, str], set[tuple]] = defaultdict(set)
    reported = {(row.task, row.arm): row.setting for row in rows}
    for path in sorted((folder / "results").glob("*.json")):
        result = read_result(folder, path.stem)
        key = (result["task"], result["arm"])
        if key in reported and not result["choosing"] and "failed" not in result and result["epochs"]:
            found[key].add((result["epochs"], result["batch_size"], result["lr"]))
    return {
        key: others for key, settings in found.items() if (others := len(settings - {tuple(reported[key].values())}))
    }
