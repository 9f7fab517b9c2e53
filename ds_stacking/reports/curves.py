"""Learning curves of a run against tokens, FLOPs and seconds, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import whole_file
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside
from ds_stacking.reports.run_files import read_metrics

Records = Sequence[Mapping[str, Any]]


@dataclass(kw_only=True)
class Curve:
    """One line of the figure. Colours are Okabe and Ito's, which the colour-blind tell apart."""

    label: str
    """Its name in the legend."""
    fields: dict[str, str]
    """For each kind of record that has a point of it, the field that holds the loss."""
    style: dict[str, Any]
    """How matplotlib draws it."""


CURVES = (
    Curve(
        label="held-out",
        fields={"eval": "eval_loss", "growth": "eval_loss_after"},
        style={"color": "#0072B2", "lw": 2.0, "marker": "o", "ms": 3.5, "zorder": 4},
    ),
    Curve(
        label="held-out, [MASK] positions only",
        fields={"eval": "eval_loss_masked"},
        style={"color": "#D55E00", "lw": 1.6, "ls": "--", "marker": "s", "ms": 3, "zorder": 3},
    ),
    Curve(label="training", fields={"train": "loss"}, style={"color": "#999999", "lw": 0.8, "zorder": 2}),
)
UNITS = {
    "tokens": ((1e12, "trillion tokens"), (1e9, "billion tokens"), (1e6, "million tokens"), (1, "tokens")),
    "flops": tuple(
        (10.0**power, f"model {unit}FLOPs") for power, unit in zip(range(21, 2, -3), "ZEPTGMk", strict=True)
    ),
    "seconds": ((3600, "wall clock (hours)"), (60, "wall clock (minutes)"), (1, "wall clock (seconds)")),
}
"""For each quantity that a loss is drawn against: the units of its axis, the largest first."""


def draw_curves(run_dir: str | Path) -> Path:
    """Draw `run_dir`/report/curves.png: loss against tokens, FLOPs and seconds, with every growth marked."""
    records = read_metrics(run_dir)
    if not any(record["kind"] == "eval" for record in records):
        raise UserError(f"{run_dir} holds no evaluation yet; draw its curves after the first one.")
    run_dir, figure = Path(run_dir), build_figure(records)
    path = run_dir / "report" / "curves.png"
    with writing(path):
        make_inside(run_dir, "report")
        with whole_file(path, inside=run_dir) as file:
            figure.savefig(file, format="png")
    return path


def build_figure(records: Records) -> Figure:
    """The figure: one panel for each quantity of `UNITS`, all with the same losses."""
    figure = Figure(figsize=(11, 4), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(UNITS), sharey=True)
    for axes, quantity in zip(panels, UNITS, strict=True):
        _draw_panel(axes, records, quantity)
    panels[0].set_ylabel("masked-language-model loss (nats)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CURVES), frameon=False)
    return figure


def growth_name(growth: Mapping[str, Any]) -> str:
    """`3 → 6`, from a growth's record."""
    return f"{growth.get('from_layers', '?')} → {growth.get('to_layers', '?')}"


def axis_unit(quantity: str, end: float) -> tuple[float, str]:
    """Size and name of the unit for an axis of one of UNITS that reaches `end`."""
    return next(((scale, unit) for scale, unit in UNITS[quantity] if end >= 2 * scale), UNITS[quantity][-1])


def _draw_panel(axes: Axes, records: Records, quantity: str) -> None:
    end = max((record.get(quantity, 0.0) for record in records), default=0.0) or 1.0
    scale, unit = axis_unit(quantity, end)
    for curve in CURVES:
        points = [
            (record[quantity] / scale, record[curve.fields[record["kind"]]])
            for record in records
            if record.get(curve.fields.get(record["kind"], "")) is not None and record.get(quantity) is not None
        ]
        if points:
            every = 1 + len(points) // 40  # markers that touch would hide the line
            axes.plot(*zip(*points, strict=True), label=curve.label, markevery=every, **curve.style)
    _mark_stages(axes, [record for record in records if record["kind"] == "growth"], quantity, scale, end / scale)
    axes.set_xlim(0, 1.015 * end / scale)
    axes.set_xlabel(unit)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_stages(axes: Axes, growths: Records, quantity: str, scale: float, end: float) -> None:
    """Shade every second stage and name each growth on a vertical line."""
    growths = [growth for growth in growths if growth.get(quantity) is not None]
    places = [growth[quantity] / scale for growth in growths]
    edges = [0, *places, end]
    for left, right in list(zip(edges, edges[1:], strict=False))[1::2]:
        axes.axvspan(left, right, color="#f2f2f2", lw=0, zorder=0)
    for growth, place in zip(growths, places, strict=True):
        axes.axvline(place, color="#333333", lw=0.9, ls=":", zorder=1)
        axes.annotate(
            f"{growth_name(growth)} layers",
            xy=(place, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            rotation=90,
            ha="left",
            va="top",
            fontsize=8,
        )
