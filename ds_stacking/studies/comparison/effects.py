"""What the arms of a comparison differ by: gains at equal cost, savings at equal loss, pairs of arms, and depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ds_stacking.studies.comparison.results import End, Results
from ds_stacking.studies.comparison.statistics import (
    POINTS,
    Effect,
    Hole,
    Place,
    cost_at,
    deviation_of,
    effect,
    holm,
    is_beaten,
    loss_at,
    place_of,
    seeds_needed,
)

COSTS = ("flops", "tokens", "seconds")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms at equal FLOPs."""

    first: str
    """Name of an arm."""
    second: str
    """Name of another."""
    difference: Effect
    """Loss of the first minus that of the second, seed by seed; negative where the first is better."""
    adjusted: float | None
    """p-value after Holm's correction for all pairs; None with fewer than two seeds."""
    flops_ratio: float
    """FLOPs of the first over those of the second, the mean over seeds: not 1 where steps could not be divided."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """How many seeds an interval of a wanted width needs."""

    half: float
    """Half of the interval."""
    of_saving: bool
    """Whether that is a share of scratch's FLOPs; else nats of a gain."""
    seeds: int | None
    """The smallest number; None for more than a million."""


@dataclass(frozen=True, kw_only=True)
class Shallow:
    """Whether the final depth beats a model that stays shallow, at equal FLOPs."""

    arm: str
    """Name of the shallow arm."""
    baseline: str
    """Name of the scratch arm."""
    advantage: Effect
    """Loss of the shallow model minus that of the deep one; positive where depth pays."""
    spread: float | None
    """The larger standard deviation over seeds of the two."""
    pays: bool | None
    """Whether depth pays against this arm; None where it cannot be told."""


def label_of(cost: str) -> str:
    """Which of an arm's runs tells about a cost: that of equal time about seconds, that of equal FLOPs otherwise."""
    return "time" if cost == "seconds" else "flops"


def gain(results: Results, arm: str, cost: str) -> Effect:
    """Nats by which an arm's loss lies below its baseline's at the same `cost`."""

    def value(baseline: str, end: End) -> float | None:
        same = loss_at(results.frontier(baseline, end.seed, cost), getattr(end, cost))
        return None if same is None else same - end.loss

    return _over_seeds(results, arm, cost, value)


def saving(results: Results, arm: str, cost: str) -> Effect:
    """Share of `cost` that an arm saves where its baseline reaches the same loss."""

    def value(baseline: str, end: End) -> float | None:
        same = cost_at(results.frontier(baseline, end.seed, cost), end.loss)
        return None if same is None else 1 - getattr(end, cost) / same

    return _over_seeds(results, arm, cost, value)


def _over_seeds(results: Results, arm: str, cost: str, value: Callable[[str, End], float | None]) -> Effect:
    """A value of each seed of an arm, none where one of its runs failed or its baseline lacks a planned budget.

    Seeds whose times cannot be used are left out of what is about time.
    """
    baseline = results.arms[arm]["baseline"]
    ends = results.of(arm, label_of(cost))
    if baseline is None:
        return effect({})
    holes = _holes(results, arm, label_of(cost))
    left_out = [
        seed
        for seed in ends
        if cost == "seconds"
        and seed not in holes
        and not (results.is_timed(arm, seed) and results.is_timed(baseline, seed))
    ]
    used = {seed: end for seed, end in ends.items() if seed not in holes and seed not in left_out}
    return effect({seed: value(baseline, end) for seed, end in used.items()}, left_out, holes)


def _holes(results: Results, arm: str, label: str) -> dict[int, Hole]:
    """Seeds that have no value beside a baseline, since a run failed or a budget of the baseline is not there yet."""
    baseline = results.arms[arm]["baseline"]
    found = {} if baseline is None else {seed: results.hole(baseline, seed) for seed in results.of(arm, label)}
    holes: dict[int, Hole] = {seed: hole for seed, hole in found.items() if hole is not None}
    return holes | dict.fromkeys(results.lost(arm, label), "failed")


def _at_unit(results: Results, first: str, second: str) -> tuple[Effect, list[int]]:
    """Loss of an arm minus that of another at equal FLOPs, and the seeds that both have; none where one failed."""
    one, other = results.at_unit(first), results.at_unit(second)
    seeds = [seed for seed in one if seed in other]
    holes: dict[int, Hole] = dict.fromkeys(
        sorted({*results.lost_at_unit(first), *results.lost_at_unit(second)}), "failed"
    )
    return effect({seed: one[seed].loss - other[seed].loss for seed in seeds}, holes=holes), seeds


def least_saving(results: Results, arm: str, cost: str) -> float | None:
    """What an arm saves at the least where in every seed no budget of its baseline reached its loss, else None."""
    baseline, known = results.arms[arm]["baseline"], saving(results, arm, cost)
    if baseline is None or known.holes:
        return None
    bounds = []
    for seed, end in results.of(arm, label_of(cost)).items():
        if seed in known.left_out:
            continue
        frontier = results.frontier(baseline, seed, cost)
        if place_of(frontier, end.loss) != "below":
            return None
        bounds.append(1 - getattr(end, cost) / frontier[-1][0])
    return min(bounds, default=None)


def places(results: Results, arm: str) -> dict[Place, list[int]]:
    """Seeds of an arm by where its loss lies beside the ends of its baseline."""
    baseline, found = results.arms[arm]["baseline"], dict[Place, list[int]]()
    if baseline is not None:
        holes = _holes(results, arm, "flops")
        for seed, hole in holes.items():
            found.setdefault(hole, []).append(seed)
        ends = results.of(arm, "flops").items()
        for seed, end in [(seed, end) for seed, end in ends if seed not in holes]:
            found.setdefault(place_of(results.frontier(baseline, seed, "flops"), end.loss), []).append(seed)
    return found


def compared(results: Results) -> list[str]:
    """Arms that are measured against a scratch arm: those that grow or were given first, then shallow ones."""
    named = results.of_kind("grown", "own") + results.of_kind("shallow")
    return [arm for arm in named if results.arms[arm]["baseline"] is not None]


def adjusted_gains(results: Results) -> dict[str, float]:
    """Holm's p-values of the gains at equal FLOPs of the arms that grow or were given: the question asked."""
    p = {arm: gain(results, arm, "flops").p for arm in results.of_kind("grown", "own")}
    known = {arm: value for arm, value in p.items() if value is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def pairs(results: Results) -> list[Pair]:
    """All pairs of arms that have a seed in common at equal FLOPs, in the order of the plan."""
    found = []
    ends = {arm: results.at_unit(arm) for arm in results.arms}
    for first, second in combinations(results.arms, 2):
        difference, seeds = _at_unit(results, first, second)
        if seeds:
            ratio = float(np.mean([ends[first][seed].flops / ends[second][seed].flops for seed in seeds]))
            found.append((first, second, difference, ratio))
    p_values = [difference.p for _, _, difference, _ in found if difference.p is not None]
    adjusted = iter(holm(p_values))
    return [
        Pair(
            first=first,
            second=second,
            difference=difference,
            adjusted=None if difference.p is None else next(adjusted),
            flops_ratio=ratio,
        )
        for first, second, difference, ratio in found
    ]


def power(results: Results, arm: str) -> Power | None:
    """Seeds for a saving of FLOPs +-5 points; where it has no mean, for a gain +- what 5 % of the FLOPs are worth."""
    known = saving(results, arm, "flops")
    if known.deviation:
        return Power(half=POINTS, of_saving=True, seeds=seeds_needed(known.deviation))
    deviation, worth = gain(results, arm, "flops").deviation, worth_of_points(results, arm)
    if known.mean is not None or not deviation or worth is None:
        return None
    return Power(half=worth, of_saving=False, seeds=seeds_needed(deviation, worth))


def worth_of_points(results: Results, arm: str) -> float | None:
    """Nats that 5 % of its baseline's FLOPs are worth between its first and last budget; None where none are."""
    baseline = results.arms[arm]["baseline"]
    ends = [list(results.of(baseline, label).values()) for label in results.labels(baseline)] if baseline else []
    if len(ends) < 2:
        return None
    (first, low), (last, high) = (
        (float(np.mean([end.loss for end in group])), float(np.mean([end.flops for end in group])))
        for group in (ends[0], ends[-1])
    )
    if last >= first or high <= low:
        return None
    return -math.log(1 - POINTS) * (first - last) / math.log(high / low)


def shallow_arms(results: Results) -> list[Shallow]:
    """Every shallow arm beside its baseline at equal FLOPs; see `is_beaten` for what is asked."""
    found = []
    for arm in results.of_kind("shallow"):
        baseline = results.arms[arm]["baseline"]
        if baseline is None:
            continue
        deep, flat = results.at_unit(baseline), results.at_unit(arm)
        advantage, seeds = _at_unit(results, arm, baseline)
        deviations = [deviation_of([ends[seed].loss for seed in seeds]) for ends in (deep, flat)]
        spread = max((d for d in deviations if d is not None), default=None)
        pays = is_beaten(advantage, spread)
        found.append(Shallow(arm=arm, baseline=baseline, advantage=advantage, spread=spread, pays=pays))
    return found


def depth_pays(results: Results) -> bool | None:
    """Whether the final depth beats every shallow arm; one that it does not beat is enough for False."""
    verdicts = [check.pays for check in shallow_arms(results)]
    if False in verdicts:
        return False
    return True if verdicts and None not in verdicts else None
