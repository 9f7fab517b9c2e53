"""The tables of a comparison as cells of text: ends, arms beside their baselines, pairs, learning rates, runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_stacking.reports.table import count, duration, flops
from ds_stacking.studies.comparison.conclusion import LEVEL, depth_limits
from ds_stacking.studies.comparison.effects import (
    COSTS,
    compared,
    depth_pays,
    gain,
    least_saving,
    pairs,
    power,
    saving,
)
from ds_stacking.studies.comparison.provenance import tuned_rates
from ds_stacking.studies.comparison.results import End, Results
from ds_stacking.studies.comparison.statistics import deviation_of
from ds_stacking.studies.comparison.words import nats_cell, number, saving_cell

Rows = list[tuple[str, ...]]
ENDS = ("run", "seeds", "loss", "FLOPs", "tokens", "wall clock", "processor")
GAINS = ("arm", "equal FLOPs", "equal tokens", "equal time", "beside")
SAVINGS = ("arm", "FLOPs saved", "time saved", "seeds for ±5 points", "beside")
PAIRS = ("arms", "difference", "p, Holm", "seeds")
RATES = ("arm", "rate", "loss", "")
RUNS = ("run", "stages", "loss", "shuffled", "steps", "tokens", "FLOPs", "wall clock", "processor")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the report."""

    title: str
    """Its heading."""
    headers: Sequence[str]
    """Of its columns."""
    rows: Rows
    """Its cells."""
    meaning: str
    """How to read it."""


MEANINGS = {
    "ends": "Every run ends with its learning rate at 0. Loss is the held-out loss on [MASK] positions in nats: mean "
    "and standard deviation over seeds. x0.7 and the like are budgets, in units of what the recipe spends in FLOPs; "
    "all others spend one unit, or (equal time) the time that scratch needs for it.",
    "gains": "Nats by which an arm ends below the scratch arm beside it at the same cost, seed by seed, positive "
    "where the arm is better; in brackets 95 % t-intervals. Scratch between two budgets is interpolated, its loss "
    "linear in the logarithm of the cost; outside them nothing is claimed.",
    "savings": "1 minus what an arm spends over what scratch would spend to end at the arm's loss. A mean is given "
    "only where every seed has a value, else the seeds one by one; “>” means that no budget of scratch reached the "
    "arm's loss in any seed. Beside it the smallest number of seeds whose interval would be ±5 percentage "
    "points of the FLOPs saved or narrower, if their spread stayed what it is. The straight line between two budgets "
    "lies above a curve that flattens out, which adds 0.3 to 0.4 points to a saving of 10 to 20 % where losses fall "
    "as the cost to the power -0.3; scratch has the rate of one unit at all budgets, which can add about a point; "
    "intervals are for the learning rates as they were chosen. {}",
    "pairs": "Loss of the first minus loss of the second, seed by seed, negative where the first is better; scratch "
    "at a budget of 1. The intervals are not corrected for the number of pairs, {}; the p-values are, by Holm's "
    "method, and a star marks those below 0.05.",
    "rates": "Mean loss over the tuning seeds at one unit of FLOPs.",
}
"""How to read each table."""


def tables(results: Results) -> list[Table]:
    """The tables that have rows, with how to read them."""
    doubt = {True: "", False: ", which means nothing here", None: ", not to be believed yet"}[depth_pays(results)]
    made = [
        ("ends", "Where the runs ended", ENDS, end_rows(results)),
        ("gains", "Gain at equal cost", GAINS, gain_rows(results)),
        ("savings", f"Saving at equal loss{doubt}", SAVINGS, saving_rows(results)),
        ("pairs", "Every two arms at equal FLOPs", PAIRS, pair_rows(results)),
        ("rates", "Learning rates tried", RATES, rate_rows(results)),
    ]
    return [
        Table(
            title=title,
            headers=headers,
            rows=rows,
            meaning=MEANINGS[name].format(" ".join(depth_limits(results)) if name == "savings" else len(rows)).strip(),
        )
        for name, title, headers, rows in made
        if rows
    ]


def end_rows(results: Results) -> Rows:
    """Scratch arms at each budget, then the others."""
    arms = results.of_kind("scratch") + results.of_kind("shallow", "grown", "own")
    return [_end_row(arm, label, results) for arm in arms for label in results.labels(arm) or ["-"]]


def _end_row(arm: str, label: str, results: Results) -> tuple[str, ...]:
    ends = [end for end in results.of(arm, label).values() if end.label == label]
    if not ends:
        return (arm, "0", *"-----")
    deviation = deviation_of([end.loss for end in ends])
    spread = "" if deviation is None else f" ± {deviation:.3f}"
    name = f"{arm} {label}" if label[0] == "x" else f"{arm}, equal time" if label == "time" else arm
    return (
        name,
        str(len(ends)) + (f" ({len(lost)} failed)" if (lost := results.lost(arm, label)) else ""),
        f"{_mean(ends, 'loss'):.3f}{spread}",
        flops(_mean(ends, "flops")),
        count(_mean(ends, "tokens")),
        duration(_mean(ends, "wall_seconds")),
        duration(_mean(ends, "cpu_seconds")),
    )


def _mean(ends: Sequence[End], field: str) -> float:
    return float(np.mean([getattr(end, field) for end in ends]))


def gain_rows(results: Results) -> Rows:
    """Gains of each arm at equal FLOPs, tokens and time."""
    return [
        (arm, *(nats_cell(gain(results, arm, cost)) for cost in COSTS), str(results.arms[arm]["baseline"]))
        for arm in compared(results)
    ]


def saving_rows(results: Results) -> Rows:
    """Savings of each arm at equal loss, and the seeds that an exact one would need."""
    return [
        (
            arm,
            *(saving_cell(saving(results, arm, c), least_saving(results, arm, c)) for c in ("flops", "seconds")),
            _needed(results, arm),
            str(results.arms[arm]["baseline"]),
        )
        for arm in compared(results)
    ]


def _needed(results: Results, arm: str) -> str:
    need = power(results, arm)
    if need is None:
        return "-"
    seeds = "> 1,000,000" if need.seeds is None else f"{need.seeds:,}"
    return seeds if need.of_saving else f"{seeds} for ±{number(need.half)} nats"


def pair_rows(results: Results) -> Rows:
    """Losses of every two arms at equal FLOPs; a star where the difference outlives Holm's correction."""
    rows: Rows = []
    for pair in pairs(results):
        p = "-" if pair.adjusted is None else "< 0.001" if pair.adjusted < 0.001 else f"{pair.adjusted:.3f}"
        star = " *" if pair.adjusted is not None and pair.adjusted < LEVEL else ""
        cell = nats_cell(pair.difference)
        rows.append((f"{pair.first} − {pair.second}", cell, f"{p}{star}", str(pair.difference.n)))
    return rows


def rate_rows(results: Results) -> Rows:
    """Every learning rate that was tried, with its loss; the chosen one is marked."""
    rows: Rows = []
    for tuned in tuned_rates(results):
        for rate, loss in tuned.rates.items():
            chosen = tuned.chosen is not None and abs(rate / tuned.chosen - 1) < 1e-3
            mark = "chosen, at the edge" if chosen and tuned.at_edge else "chosen" if chosen else ""
            rows.append((tuned.arm, f"{rate:g}", "-" if loss is None else f"{loss:.3f}", mark))
    return rows


def run_rows(results: Results) -> Rows:
    """Every finished run, those of tuning last."""
    return [
        (
            end.path,
            ", ".join(f"{layers}:{steps}" for layers, steps in results.plan["runs"][end.path]),
            f"{end.loss:.4f}",
            "-" if end.shuffled is None else f"{end.shuffled:.4f}",
            str(end.steps),
            count(end.tokens),
            flops(end.flops),
            duration(end.wall_seconds),
            duration(end.cpu_seconds) + " (disturbed)" * (end.path in results.untimed),
        )
        for end in results.ends + results.tuning
    ]
