"""Charts of a comparison for its page: losses while training and at the ends, against FLOPs, tokens and seconds."""

from __future__ import annotations

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import plain
from ds_stacking.reports.curves import axis_unit
from ds_stacking.reports.page import COLOURS
from ds_stacking.reports.run_files import read_metrics
from ds_stacking.reports.svg import Chart, Line, Point, Shape
from ds_stacking.studies.comparison.effects import COSTS, label_of
from ds_stacking.studies.comparison.provenance import cache_loss
from ds_stacking.studies.comparison.results import CLOCKS, End, Results
from ds_stacking.studies.comparison.shapes import SECONDS

Curves = dict[tuple[str, str], list[Point]]
"""(Run, cost) -> cost and loss of its evaluations, by rising cost."""
GRID = 60
"""Points of a mean curve."""
SHAPES: dict[str, Shape] = {"scratch": "circle", "shallow": "square", "grown": "circle", "own": "diamond"}
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
    """Title and SVG of the chart for each cost."""
    return [(f"Loss against {NAMES[cost]}", _chart(results, curves, cost)) for cost in COSTS]


def _chart(results: Results, curves: Curves, cost: str) -> str:
    scale, unit = axis_unit(cost, max((getattr(end, cost) for end in results.ends), default=1.0))
    unit = unit.replace("wall clock", CLOCKS[results.plan["clock"]])
    lines: list[Line] = []
    for colour, arm in enumerate(results.arms):
        for label in _labels(results, arm, cost):
            found = [curves.get((end.path, cost), []) for end in _shown(results, arm, label, cost)]
            lines += _curve([points for points in found if points], colour)
    for colour, arm in enumerate(results.arms):
        lines += _ends(results, arm, cost, colour)
    cache = cache_loss(results)
    levels = [] if cache is None else [(cache, "cache model")]
    return Chart(lines=lines, title=f"loss against {cost}", x_label=unit, x_scale=scale, levels=levels).svg()


def _labels(results: Results, arm: str, cost: str) -> list[str]:
    """Labels of the runs that tell about a cost: all budgets of scratch, or one of another arm."""
    return results.labels(arm) if results.arms[arm]["kind"] == "scratch" else [label_of(cost)]


def _shown(results: Results, arm: str, label: str, cost: str) -> list[End]:
    """Ends of an arm's runs, without those whose times cannot be used where the cost is time."""
    return [e for e in results.of(arm, label).values() if cost != "seconds" or e.path not in results.untimed]


def _curve(curves: list[list[Point]], colour: int) -> list[Line]:
    """The mean curve of one arm and budget, with a band over seeds; none where the seeds have no part in common."""
    if not curves or not (first := max(c[0][0] for c in curves)) < (last := min(c[-1][0] for c in curves)):
        return []
    grid = np.linspace(first, last, GRID)
    losses = np.array([np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    points = list(zip(grid.tolist(), losses.mean(0).tolist(), strict=True))
    band = list(zip(grid.tolist(), losses.min(0).tolist(), losses.max(0).tolist(), strict=True))
    return [Line(points=points, band=band if len(curves) > 1 else (), colour=colour % COLOURS, style="thin")]


def _ends(results: Results, arm: str, cost: str, colour: int) -> list[Line]:
    """Marks at an arm's mean ends; scratch's are joined."""
    groups = [_shown(results, arm, label, cost) for label in _labels(results, arm, cost)]
    points = [
        (float(np.mean([getattr(end, cost) for end in ends])), float(np.mean([end.loss for end in ends])))
        for ends in groups
        if ends
    ]
    shape = SHAPES[results.arms[arm]["kind"]]
    return (
        [Line(points=points, colour=colour % COLOURS, label=arm, dots=True, style="dashed", shape=shape)]
        if points
        else []
    )
