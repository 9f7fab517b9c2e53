"""Learning curves of a run against tokens, FLOPs and seconds, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ds_stacking.common.errors import UserError
from ds_stacking.reports.figure import COLOURS, Point, draw_dots, draw_png, limit_loss, mark_places, thin_out
from ds_stacking.reports.run_files import read_metrics

Records = Sequence[Mapping[str, Any]]
MOST_DOTS = 40
"""Points of a curve that are marked; more would hide the line."""


@dataclass(kw_only=True)
class Curve:
    """One line of a panel."""

    label: str
    """Its name in the legend."""
    fields: dict[str, str]
    """For each kind of record that has a point of it, the field that holds the loss."""
    colour: int
    """Number of its colour."""
    style: dict[str, Any]
    """How matplotlib draws it."""


CURVES = (
    Curve(label="training", fields={"train": "loss"}, colour=0, style={"lw": 1.0, "alpha": 0.55}),
    Curve(
        label="held-out, [MASK] positions only",
        fields={"eval": "eval_loss_masked"},
        colour=2,
        style={"ls": (0, (5, 2))},
    ),
    Curve(label="held-out", fields={"eval": "eval_loss", "growth": "eval_loss_after"}, colour=1, style={}),
)
"""The last on top."""
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
    records, run_dir = read_metrics(run_dir), Path(run_dir)
    if not any(record["kind"] == "eval" for record in records):
        raise UserError(f"{run_dir} holds no evaluation yet; draw its curves after the first one.")
    panels = [partial(draw_losses, records=records, quantity=quantity) for quantity in UNITS]
    label = "masked-language-model loss (nats)"
    return draw_png(run_dir / "report" / "curves.png", [panels], label=label, inside=run_dir)


def growth_name(growth: Mapping[str, Any]) -> str:
    """`3 → 6`, from a growth's record."""
    return f"{growth.get('from_layers', '?')} → {growth.get('to_layers', '?')}"


def axis_unit(quantity: str, end: float) -> tuple[float, str]:
    """Size and name of the unit for an axis of one of UNITS that reaches `end`."""
    return next(((scale, unit) for scale, unit in UNITS[quantity] if end >= 2 * scale), UNITS[quantity][-1])


def curve_points(records: Records, fields: Mapping[str, str], quantity: str) -> list[Point]:
    """What records know of a quantity and, in the field named for their kind, of a value."""
    known = ((record.get(quantity), record.get(fields.get(record["kind"], ""))) for record in records)
    return [(x, y) for x, y in known if x is not None and y is not None]


def draw_losses(axes: Axes, records: Records, quantity: str) -> None:
    """The losses of a run against one of UNITS; nothing but the axes where there are none."""
    shown = {curve.label: curve_points(records, curve.fields, quantity) for curve in CURVES}
    scale = label_axis(axes, [point for points in shown.values() for point in points], quantity)
    for curve in CURVES:
        if shown[curve.label]:
            points = [(x / scale, y) for x, y in thin_out(shown[curve.label])]
            axes.plot(*zip(*points, strict=True), label=curve.label, color=COLOURS[curve.colour], **curve.style)
            if curve.label != "training" and len(points) <= MOST_DOTS:
                draw_dots(axes, points, curve.colour, curve.label)
    drawn = {label: [(x / scale, y) for x, y in points] for label, points in shown.items()}
    if every := [point for points in drawn.values() for point in points]:
        limit_loss(axes, every, [point for label, points in drawn.items() if label != "training" for point in points])
    mark_growths(axes, records, quantity, scale)


def label_axis(axes: Axes, points: Sequence[Point], quantity: str) -> float:
    """Name the horizontal axis, which is one of UNITS; returns the size of its unit."""
    scale, unit = axis_unit(quantity, max((x for x, _ in points), default=0.0))
    axes.set_xlabel(unit)
    return scale


def mark_growths(axes: Axes, records: Records, quantity: str, scale: float) -> None:
    """Mark every growth on an axis of one of UNITS, the unit `scale`."""
    growths = [record for record in records if record["kind"] == "growth" and record.get(quantity) is not None]
    mark_places(axes, [(growth[quantity] / scale, f"{growth_name(growth)} layers") for growth in growths])
