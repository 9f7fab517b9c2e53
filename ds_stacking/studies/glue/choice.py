"""How a setting is chosen: on a part of the training set, never on what is reported.

The best of several settings, chosen on the set that it is then measured on, is measured too high. So a part of the
training set is held out, every setting is scored on it, and the one that is chosen is trained anew on the whole
training set and meets the development set once.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import Count, Finite
from ds_stacking.studies.glue.task_data import Examples, TaskData

LEAST_HELD_OUT = 250
"""Examples to choose on, at least, as long as they are not more than half of the training set."""
PART_SEED = 20190609
"""Seed of the part: it is the same for all settings, arms and seeds."""
HELD_OUT = "held_out"
"""What a result calls the part."""
S = TypeVar("S")


Percent = Annotated[float, Field(allow_inf_nan=False, ge=-100.1, le=100.1)]


class Choice(TypedDict):
    """How an arm came to its setting; choices.json holds one for each task and arm."""

    task: str
    arm: str
    setting: dict[str, Finite]
    """What was chosen."""
    examples: Count
    """Examples of the training set that it was chosen on; 0 where there was but one setting."""
    seeds: Count
    """Trainings of each setting."""
    scores: list[tuple[dict[str, Finite], Percent | None]]
    """Every setting with its mean score over seeds; None where a training failed."""


def held_out_mask(labels: Sequence[float], share: float) -> np.ndarray:
    """Which examples settings are chosen on [N], bool: `share` of them, at least 250, at most half.

    Every n-th of the examples, ordered by label and at random within one: each class has its share, and scores are
    spread as in the whole.
    """
    count = len(labels)
    wanted = min(max(round(share * count), LEAST_HELD_OUT), count // 2)
    order = np.lexsort((np.random.default_rng(PART_SEED).random(count), np.asarray(labels)))
    part = np.zeros(count, bool)
    part[order[((np.arange(wanted) + 0.5) * count / max(wanted, 1)).astype(int)]] = True
    return part


def hold_out(data: TaskData, share: float) -> TaskData:
    """The data that a choice may see: the rest of the training set, and the part of it that settings are scored on.

    Raises UserError for a training set of one or two examples.
    """
    if len(data.train) < 3:
        raise UserError(f"A training set of {len(data.train)} examples has no part to choose a setting on; give one.")
    part = held_out_mask(data.train.labels, share)
    return TaskData(train=_rows(data.train, ~part), dev={HELD_OUT: _rows(data.train, part)}, test={}, notes=[])


def _rows(split: Examples, wanted: np.ndarray) -> Examples:
    rows = np.flatnonzero(wanted)
    return Examples(
        texts=tuple([column[row] for row in rows] for column in split.texts),
        labels=[split.labels[row] for row in rows],
    )


def mean_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """A task's score: the mean of its figures."""
    return statistics.fmean(value for metrics in scores.values() for value in metrics.values())


def best_setting(scores: Mapping[S, float | None]) -> S | None:
    """The setting with the highest mean score, the first of equals; None where every setting failed.

    A setting of which a training failed is not chosen: it would fail again.
    """
    whole = {setting: score for setting, score in scores.items() if score is not None}
    return max(whole, key=lambda setting: whole[setting]) if whole else None


def mean_over_seeds(scores: Sequence[float | None]) -> float | None:
    """Mean of a setting's scores; None where one of its trainings failed."""
    whole = [score for score in scores if score is not None]
    return statistics.fmean(whole) if len(whole) == len(scores) else None
