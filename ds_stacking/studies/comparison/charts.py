"""Drawings of a comparison: losses while training and at the ends, against FLOPs, tokens and seconds."""

from __future__ import annotations

import textwrap
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import plain
from ds_stacking.reports.curves import axis_unit
from ds_stacking.reports.figure import COLOURS, DIM, Draw, Point, draw_dots, draw_png, limit_loss, svg
from ds_stacking.reports.run_files import read_metrics
from ds_stacking.studies.comparison.effects import COSTS, label_of
from ds_stacking.studies.comparison.provenance import cache_loss
from ds_stacking.studies.comparison.results import End, Results
from ds_stacking.studies.comparison.shapes import CLOCKS, SECONDS

Curves = dict[tuple[str, str], list[Point]]
"""(Run, cost) -> cost and loss of its evaluations, by rising cost."""
GRID = 60
"""Points of a mean curve."""
ACROSS = 170
"""Characters of a line of the picture's title."""
MARKERS = {"scratch": "o", "shallow": "s", "grown": "o", "own": "D"}
"""How the ends of each kind of arm are marked."""
NAMES = {"flops": "FLOPs", "tokens": "tokens", "seconds": "seconds"}


def read_curves(results: Results) -> Curves:
    """For every finished run, its evaluations by each cost; one whose metrics are damaged is noted in `results`."""
    curves: Curves = {}
    fields = {"flops": "flops", "tokens": "tokens", "seconds": SECONDS[results.plan["clock"]]}
    for end in results.ends:
        try:
            records = [record for record in read_metrics(results.folder / end.path) if record["kind"] == "eval"]
        except UserError as error:
            results.without_curve[end.path] = plain(str(error)).rstrip(".")
            continue
        for cost, field in fields.items():
            known = [r for r in records if field in r and "eval_loss_masked" in r]
            curves[end.path, cost] = sorted((r[field], r["eval_loss_masked"]) for r in known)
    return curves


def cost_charts(results: Results, curves: Curves) -> list[tuple[str, str]]:
    """Title and SVG of a chart for each cost, and of one with every run that spends a unit."""
    if not results.ends:
        return []
    draws: dict[str, Draw] = {
        f"Loss against {NAMES[cost]}": partial(draw_cost, results=results, curves=curves, cost=cost) for cost in COSTS
    }
    draws["Every seed at equal FLOPs"] = partial(draw_arms, results=results)
    return [(title, svg(title, draw)) for title, draw in draws.items()]


def draw_comparison(results: Results, curves: Curves, title: str, path: Path) -> Path:
    """Draw the picture under `title`: the ends against FLOPs and time, and every seed at equal FLOPs."""
    panels = [partial(draw_cost, results=results, curves=curves, cost=cost) for cost in ("flops", "seconds")]
    words = textwrap.fill(textwrap.shorten(title, 4 * ACROSS, placeholder=" ..."), ACROSS)
    label = "held-out loss on [MASK] positions (nats)"
    rows = [[*panels, partial(draw_arms, results=results)]]
    return draw_png(path, rows, label=label, title=words, inside=results.folder)


def draw_cost(axes: Axes, results: Results, curves: Curves, cost: str) -> None:
    """Mean ends of every arm against a cost, and the way there; arms are colours, the kinds of arms marks."""
    ends = {arm: _ends(results, arm, cost) for arm in results.arms}
    everything = [point for points in ends.values() for point in points]
    scale, unit = axis_unit(cost, max((x for x, _ in everything), default=1.0))
    axes.set_xlabel(unit.replace("wall clock", CLOCKS[results.plan["clock"]]))
    for number, arm in enumerate(results.arms):
        for label in _labels(results, arm, cost):
            found = [curves.get((end.path, cost), []) for end in _shown(results, arm, label, cost)]
            everything += _draw_mean(axes, [points for points in found if points], number % len(COLOURS), scale)
    for number, (arm, points) in enumerate(ends.items()):
        if points:
            places = [(x / scale, y) for x, y in points]
            colour = number % len(COLOURS)
            axes.plot(*zip(*places, strict=True), color=COLOURS[colour], lw=1.4, ls=(0, (5, 4)), label=arm,
                      marker=MARKERS[results.arms[arm]["kind"]], ms=0)  # fmt: skip
            draw_dots(axes, places, colour, arm, marker=MARKERS[results.arms[arm]["kind"]])
    if everything:
        limit_loss(axes, [(x / scale, y) for x, y in everything])
    _draw_cache(axes, results)


def draw_arms(axes: Axes, results: Results) -> None:
    """The ends that spend one unit, every seed, arm by arm."""
    for place, arm in enumerate(results.arms):
        points = [(float(place), end.loss) for end in results.at_unit(arm).values()]
        if points:
            draw_dots(axes, points, place % len(COLOURS), arm, marker=MARKERS[results.arms[arm]["kind"]])
    axes.set_xticks(range(len(results.arms)), list(results.arms), rotation=30, ha="right", fontsize=11)
    axes.set_xlim(-0.6, len(results.arms) - 0.4)
    _draw_cache(axes, results)


def _draw_cache(axes: Axes, results: Results) -> None:
    """The cache model's line."""
    cache = cache_loss(results)
    if cache is not None:
        low, high = axes.get_ylim()
        axes.axhline(cache, color=DIM, lw=1.0, ls=(0, (2, 3)))
        axes.annotate("cache model", (1, cache), (0, 3), xycoords=("axes fraction", "data"), ha="right", fontsize=11,
                      textcoords="offset points")  # fmt: skip
        axes.set_ylim(min(low, cache - 0.05), max(high, cache + 0.1))


def _labels(results: Results, arm: str, cost: str) -> list[str]:
    """Labels of the runs that tell about a cost: all budgets of scratch, or one of another arm."""
    return results.labels(arm) if results.arms[arm]["kind"] == "scratch" else [label_of(cost)]


def _shown(results: Results, arm: str, label: str, cost: str) -> list[End]:
    """Ends of an arm's runs, without those whose times cannot be used where the cost is time."""
    return [e for e in results.of(arm, label).values() if cost != "seconds" or e.path not in results.untimed]


def _draw_mean(axes: Axes, curves: list[list[Point]], colour: int, scale: float) -> list[Point]:
    """The mean curve of one arm and budget, with a band over seeds; none where the seeds have no part in common."""
    if not curves or not (first := max(c[0][0] for c in curves)) < (last := min(c[-1][0] for c in curves)):
        return []
    grid = np.linspace(first, last, GRID)
    losses = np.array([np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    axes.plot(grid / scale, losses.mean(0), color=COLOURS[colour], lw=1.0, alpha=0.55)
    if len(curves) > 1:
        axes.fill_between(grid / scale, losses.min(0), losses.max(0), color=COLOURS[colour], alpha=0.16, lw=0)
    return list(zip(grid.tolist(), losses.mean(0).tolist(), strict=True))


def _ends(results: Results, arm: str, cost: str) -> list[Point]:
    """The mean ends of an arm: those of its budgets, or one."""
    groups = [_shown(results, arm, label, cost) for label in _labels(results, arm, cost)]
    return [
        (float(np.mean([getattr(end, cost) for end in ends])), float(np.mean([end.loss for end in ends])))
        for ends in groups
        if ends
    ]
