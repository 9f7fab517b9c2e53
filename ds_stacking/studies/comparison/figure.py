"""The picture of a comparison: the ends of all runs against FLOPs and seconds, those of scratch joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ds_stacking.common.files import whole_file
from ds_stacking.reports.curves import axis_unit
from ds_stacking.studies.comparison.results import Results, label_of

CLOCKS = {"wall": "wall clock", "cpu": "processor time"}
COLOURS = ("#5b6470", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's, scratch grey."""


def draw_comparison(results: Results, path: Path) -> Path:
    """Draw the picture; every seed is a point, arms are colours."""
    figure = Figure(figsize=(10, 4.2), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost in zip(panels, ("flops", "seconds"), strict=True):
        _draw_panel(axes, results, cost)
    panels[0].set_ylabel("held-out loss on [MASK] positions (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with whole_file(path, inside=results.folder) as file:
        figure.savefig(file, format="png")
    return path


def _draw_panel(axes: Axes, results: Results, cost: str) -> None:
    scale, unit = axis_unit(cost, max(getattr(end, cost) for end in results.ends))
    for arm, colour in zip(results.plan["arms"], COLOURS, strict=False):
        if arm == "scratch":
            ends = [end for end in results.ends if end.arm == arm]
            for end in {(end.seed, end.data): end for end in ends}.values():
                line = np.array(results.frontier(end, cost)) / (scale, 1.0)
                axes.plot(line[:, 0], line[:, 1], color=colour, lw=0.8)
        else:
            ends = list(results.of(arm, label_of(cost)).values())
        places = np.array([(getattr(end, cost) / scale, end.loss) for end in ends]).reshape(-1, 2)
        axes.scatter(places[:, 0], places[:, 1], color=colour, s=28, zorder=3, label=arm)
    axes.set_xlabel(unit.replace("wall clock", CLOCKS[results.plan["clock"]]))
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
