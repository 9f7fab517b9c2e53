"""What became of a run's growths, as a figure: copies and their originals, norms by block, losses and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ds_stacking.common.files import whole_file
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside

COSINES = {
    "copy_cosine_master": ("weights", "#0072B2", "-"),
    "copy_cosine_exp_avg": ("first moment", "#D55E00", "--"),
    "copy_cosine_exp_avg_sq": ("second moment", "#009E73", ":"),
}
"""For each field of an observation: its name in the legend, colour (Okabe and Ito) and line style."""


def draw_growths(run_dir: str | Path, growths: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw `run_dir`/report/growths.png, a row for each growth of a summary; None where none was looked at."""
    growths = [growth for growth in growths if growth["observations"]]
    if not growths:
        return None
    run_dir, figure = Path(run_dir), build_figure(growths)
    path = run_dir / "report" / "growths.png"
    with writing(path):
        make_inside(run_dir, "report")
        with whole_file(path, inside=run_dir) as file:
            figure.savefig(file, format="png")
    return path


def build_figure(growths: Sequence[Mapping[str, Any]]) -> Figure:
    """One row of four panels for each growth."""
    figure = Figure(figsize=(13, 3.3 * len(growths) + 0.3), dpi=160, layout="constrained")
    rows = figure.subplots(len(growths), 4, squeeze=False)
    for row, growth in zip(rows, growths, strict=True):
        title = f"{growth['from_layers']} → {growth['to_layers']} layers, {growth['operator']}"
        row[0].set_title(title, loc="left", fontsize=10)
        _draw_cosines(row[0], growth["observations"])
        _draw_norms(row[1], growth, "weight_norm", "norm of a block's weights")
        _draw_norms(row[2], growth, "gradient_norm", "norm of a block's gradient")
        _draw_seconds(row[3], growth)
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_cosines(axes: Axes, observations: Sequence[Mapping[str, Any]]) -> None:
    """Mean over the copies, and the range that they span, against optimizer steps since the growth."""
    for field, (label, colour, style) in COSINES.items():
        known = [(o["steps_since"], [c for c in o[field].values() if c is not None]) for o in observations]
        known = [(steps, found) for steps, found in known if found]
        if not known:
            continue
        steps, found = zip(*known, strict=True)
        axes.plot(steps, [sum(f) / len(f) for f in found], color=colour, ls=style, marker="o", ms=3, label=label)
        axes.fill_between(steps, [min(f) for f in found], [max(f) for f in found], color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimizer steps since the growth")
    axes.set_ylabel("cosine of copy and original")
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def _draw_norms(axes: Axes, growth: Mapping[str, Any], field: str, title: str) -> None:
    """By block, at the first and the last look; dotted lines mark the seams."""
    looks = [o for o in growth["observations"] if o[field]]
    for look, colour in zip(dict.fromkeys((0, len(looks) - 1)) if looks else (), ("#999999", "#0072B2"), strict=False):
        norms = looks[look][field]
        label = f"step {looks[look]['steps_since']:,}"
        axes.plot([int(b) for b in norms], list(norms.values()), color=colour, marker="o", ms=3, label=label)
    if looks:
        for seam in looks[0][f"{field}_jump"]:
            axes.axvline(int(seam) - 0.5, color="#333333", lw=0.9, ls=":")
        axes.legend(frameon=False, fontsize=8)
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel(title)
    axes.grid(axis="y", color="#dddddd", lw=0.6)


def _draw_seconds(axes: Axes, growth: Mapping[str, Any]) -> None:
    """Seconds by phase as bars, the losses as the title."""
    phases = growth["seconds_by_phase"]
    bars = axes.barh(list(phases), list(phases.values()), color="#56B4E9")
    axes.bar_label(bars, fmt="%.2g s", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(f"seconds; {growth['bytes_moved'] / 1e6:,.1f} MB written per rank")
    names = {"eval_loss_before": "before", "eval_loss_after": "after", "eval_loss_later": "later"}
    losses = [f"{growth[key]:.3f} {name}" for key, name in names.items() if growth.get(key) is not None]
    axes.set_title("held-out loss:\n" + ", ".join(losses), loc="left", fontsize=9)
