"""Rows of the table of GLUE: what the final trainings of a setting scored, and how that setting was chosen."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_stacking.common.errors import UserError
from ds_stacking.studies.glue.choice import Choice
from ds_stacking.studies.glue.results import MEND, Result, read_result
from ds_stacking.studies.glue.tasks import TASKS

ARMS = {
    "model": "this model",
    "untrained": "same, untrained",
    "bag_of_words": "bag of words",
    "naive_bayes": "naive-Bayes weights",
}
"""What is measured, and what a column calls it."""


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
    choice: Choice | None
    """How."""
    first: str
    """The training with the lowest seed: its predictions are submitted."""


def read_scored(folder: Path, name: str) -> Result:
    """One training's result, with all figures of its task. Raises UserError where it is missing or damaged."""
    result, path = read_result(folder, name), folder / "results" / f"{name}.json"
    if result is None:
        raise UserError(f"{path} is missing; give the same command again.")
    task = TASKS.get(result["task"])
    figures = 1 if result["choosing"] else len(task.dev) * len(task.metrics) if task else 0
    if "failed" not in result and (task is None or len(_figures(result, "scores")) < figures):
        raise UserError(f"{path} does not hold the figures of a task of GLUE; {MEND}.")
    return result


def summarise(results: Mapping[str, Result], choices: Mapping[tuple[str, str], Choice]) -> list[Row]:
    """One row for each task, arm and kind of set, of the final trainings among `results`."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, result in results.items():
        if not result["choosing"]:
            groups[result["task"], result["arm"]].append(name)
    keys = [(task, arm) for task in TASKS for arm in ARMS if (task, arm) in groups]
    return [
        _row(sets, {name: results[name] for name in groups[key]}, choices.get(key))
        for key in keys
        for sets, scores in (("dev", "scores"), ("test", "test_scores"))
        if results[groups[key][0]].get(scores)
    ]


def _row(sets: str, results: Mapping[str, Result], choice: Choice | None) -> Row:
    key: Literal["scores", "test_scores"] = "scores" if sets == "dev" else "test_scores"
    figures = [_figures(result, key) for result in results.values()]
    first = min(results, key=lambda name: results[name]["seed"])
    one = results[first]
    own = {"epochs": one["epochs"], "batch_size": one["batch_size"], "lr": one["lr"]}
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


def _figures(result: Result, key: Literal["scores", "test_scores"]) -> list[float]:
    """All metrics of all sets, in order."""
    return [value for metrics in result.get(key, {}).values() for value in metrics.values()]


def other_finals(folder: Path, rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    """Task and arm -> settings beside the reported one that other commands have scored in this folder."""
    found: dict[tuple[str, str], set[tuple]] = defaultdict(set)
    reported = {(row.task, row.arm): row.setting for row in rows}
    for path in sorted((folder / "results").glob("*.json")):
        result = read_scored(folder, path.stem)
        key = (result["task"], result["arm"])
        if key in reported and not result["choosing"] and "failed" not in result and result["epochs"]:
            found[key].add((result["epochs"], result["batch_size"], result["lr"]))
    return {
        key: others for key, settings in found.items() if (others := len(settings - {tuple(reported[key].values())}))
    }
