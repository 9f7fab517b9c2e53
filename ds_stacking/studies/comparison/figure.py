"""The picture of a comparison: the ends of all runs against FLOPs and seconds, and arm by arm at equal FLOPs."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ds_stacking.common.files import whole_file
from ds_stacking.reports.curves import axis_unit
from ds_stacking.studies.comparison.effects import label_of
from ds_stacking.studies.comparison.provenance import cache_loss
from ds_stacking.studies.comparison.results import CLOCKS, End, Results

COLOURS = (
    *("#5b6470", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#C4254E", "#0A7F8E", "#6A4FC9", "#5F7D00"),
)
"""Okabe and Ito's, the first arm grey, and four more."""
MARKERS = {"scratch": "o", "shallow": "s", "grown": "o", "own": "D"}
"""What the ends of each kind of arm are; shallow ones are hollow."""
ACROSS = 160
"""Characters of a line of the title."""


def draw_comparison(results: Results, title: str, path: Path) -> Path:
    """Draw the picture under `title`; every seed is a point, arms are colours."""
    figure = Figure(figsize=(12.5, 5.0), dpi=140, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, cost in zip(panels, ("flops", "seconds"), strict=False):
        _draw_panel(axes, results, cost)
    _draw_arms(panels[2], results)
    for axes in panels:
        _finish(axes, results)
    panels[0].set_ylabel("held-out loss on [MASK] positions (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9), frameon=False)
    words = textwrap.shorten(title, 4 * ACROSS, placeholder=" ...")
    figure.suptitle(textwrap.fill(words, ACROSS), fontsize=9.5, parse_math=False)
    with whole_file(path, inside=results.folder) as file:
        figure.savefig(file, format="png")
    return path


def _draw_panel(axes: Axes, results: Results, cost: str) -> None:
    ends = [end for end in results.ends if cost != "seconds" or end.path not in results.untimed]
    scale, unit = axis_unit(cost, max((getattr(end, cost) for end in ends), default=1.0))
    for number, (arm, plan) in enumerate(results.arms.items()):
        colour, is_scratch = COLOURS[number % len(COLOURS)], plan["kind"] == "scratch"
        own = [end for end in ends if end.arm == arm and _tells(results, end, cost)]
        for seed in {end.seed for end in own} if is_scratch else ():
            line = sorted((getattr(end, cost) / scale, end.loss) for end in own if end.seed == seed)
            axes.plot(*zip(*line, strict=True), color=colour, lw=0.8)
        places = [getattr(end, cost) / scale for end in own]
        axes.scatter(places, [end.loss for end in own], label=arm, **_marks(results, arm))
    axes.set_xlabel(unit.replace("wall clock", CLOCKS[results.plan["clock"]]))


def _draw_arms(axes: Axes, results: Results) -> None:
    """The ends that spend one unit, arm by arm."""
    for place, arm in enumerate(results.arms):
        losses = [end.loss for end in results.at_unit(arm).values()]
        axes.scatter([place] * len(losses), losses, **_marks(results, arm))
    axes.set_xticks(range(len(results.arms)), list(results.arms), rotation=40, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(results.arms) - 0.4)
    axes.set_xlabel("at equal FLOPs")


def _marks(results: Results, arm: str) -> dict[str, Any]:
    """How the ends of an arm look."""
    kind, colour = results.arms[arm]["kind"], COLOURS[list(results.arms).index(arm) % len(COLOURS)]
    inside = "none" if kind == "shallow" else colour
    return {"edgecolors": colour, "facecolors": inside, "marker": MARKERS[kind], "s": 28, "zorder": 3}


def _finish(axes: Axes, results: Results) -> None:
    """The cache model's line, and a quiet frame."""
    cache = cache_loss(results)
    if cache is not None:
        axes.axhline(cache, color="#333333", lw=1.0, ls=":", zorder=1, label="cache model")
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _tells(results: Results, end: End, cost: str) -> bool:
    """Whether a run tells about a cost: all of scratch, and of another arm the one that matches the cost."""
    return results.arms[end.arm]["kind"] == "scratch" or results.of(end.arm, label_of(cost)).get(end.seed) == end
