"""The report of one run as one HTML page: the wandb dashboard without wandb, from metrics.jsonl and summary.json.

It can be written while the run goes on; what has not been measured yet is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_text
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside
from ds_stacking.common.words import shown
from ds_stacking.reports.closing import verdict
from ds_stacking.reports.curves import (
    CURVES,
    UNITS,
    Records,
    curve_points,
    draw_losses,
    growth_name,
    label_axis,
    mark_growths,
)
from ds_stacking.reports.figure import COLOURS, Point, svg, thin_out
from ds_stacking.reports.growth_figure import growth_panels, observed_growths
from ds_stacking.reports.page import cards, charts, heading, legend, page, paragraph, table
from ds_stacking.reports.run_files import read_metrics, read_run_name, read_summary
from ds_stacking.reports.table import HEADERS, count, duration, flops, loss, stage_cells

RATES: tuple[tuple[str, str, tuple[tuple[float, str], ...]], ...] = (
    ("Tokens per second", "tokens_per_second", ((1e6, "million"), (1e3, "thousand"), (1, ""))),
    (
        "Model FLOP per second",
        "flops_per_second",
        ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1, "FLOP/s")),
    ),
    ("Model FLOPs utilisation", "mfu", ((1, ""),)),
    ("Learning rate", "lr", ((1, ""),)),
    ("Gradient norm before clipping", "grad_norm", ((1, ""),)),
)
"""Charts of what a training record holds: title, field, and units, the largest first."""
GROWTHS = (
    "growth",
    "operator",
    "optimizer state",
    "seconds",
    "loss before",
    "loss after",
    "loss later",
    "tensors verified",
)


def write_report(run_dir: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write `run_dir`/report/report.html.

    `summary` is that of the run where it is not yet in its file. Raises UserError where no run has begun there or a
    file is damaged, RunFailed where the page cannot be written.
    """
    if not str(run_dir).strip():
        raise UserError("The name of a run directory is empty; give the directory of a run.")
    run_dir = Path(run_dir)
    if not os.path.isdir(run_dir):
        raise UserError(f"{shown(str(run_dir))} is no folder; give the directory of a run.")
    records, name = read_metrics(run_dir), read_run_name(run_dir)
    if summary is None:
        summary = read_summary(run_dir)
    content = html(records, name, summary or {})
    path = run_dir / "report" / "report.html"
    with writing(path):
        make_inside(run_dir, "report")
        write_text(path, content, inside=run_dir)
    return path


def html(records: Records, name: str, summary: Mapping[str, Any]) -> str:
    """The page of a run: figures, losses, speed by stage, growths, blocks."""
    trained = [record for record in records if record["kind"] == "train"]
    growths = [record for record in records if record["kind"] == "growth"]
    parts = [
        f"<h1>{escape(name)}</h1>",
        paragraph(_state(records, summary), dim=True),
        cards(_figures(records, summary)),
        *([paragraph(words)] if (words := verdict(summary)) else []),
    ]
    names = [(curve.colour, curve.label) for curve in reversed(CURVES)]
    parts += [heading("Loss"), legend(names), charts(_losses(records))]
    if summary.get("stages"):
        headers = (*HEADERS, "tokens/s")
        rows = zip(stage_cells(summary["stages"]), _speeds(trained, summary["stages"]), strict=True)
        parts += [heading("Stages"), table(headers, ((*cells, speed) for cells, speed in rows))]
    if growths:
        later = {growth.get("stage"): growth.get("eval_loss_later") for growth in summary.get("growths", ())}
        parts += [heading("Growths"), table(GROWTHS, (_growth_row(growth, later) for growth in growths))]
    if blocks := _blocks(records):
        parts += [heading("Blocks after a growth"), *blocks]
    parts += [heading("Speed and optimisation"), charts(_rates(records))]
    return page(name, parts)


def _state(records: Records, summary: Mapping[str, Any]) -> str:
    if summary.get("finished"):
        steps, ranks, zero = (summary.get(name, "?") for name in ("steps", "world_size", "zero_stage"))
        steps = f"{steps:,}" if isinstance(steps, int) else steps
        return f"Finished: {steps} steps on {ranks} rank{'s' * (ranks != 1)}, ZeRO stage {zero}."
    return f"Not finished: step {records[-1]['step']:,}." if records else "Nothing has been logged yet."


def _figures(records: Records, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cards: closing figures, or where the run stands."""
    evaluated = [record for record in records if record["kind"] == "eval"]
    latest = {**(records[-1] if records else {}), **(evaluated[-1] if evaluated else {}), **summary}
    figures = [
        (loss(latest.get("eval_loss_masked")), "held-out loss on [MASK] (nats)"),
        (loss(latest.get("unigram_cross_entropy")), "unigram line: word frequencies only"),
        (loss(latest.get("cache_loss")), "cache line: and the words of the sequence"),
        (loss(latest.get("eval_loss_shuffled")), "sensitivity to order: on shuffled sequences"),
        (count(latest.get("parameters")), "parameters"),
        (count(latest.get("tokens")), "tokens"),
        (flops(latest.get("flops")), "model FLOPs"),
        (duration(latest.get("seconds")), "wall clock"),
    ]
    return [figure for figure in figures if figure[0] != "-"]


def _losses(records: Records) -> list[tuple[str, str]]:
    """A chart for each of UNITS that something is known of."""
    found = []
    for quantity in UNITS:
        title = f"Against {'FLOPs' if quantity == 'flops' else quantity}"
        if any(curve_points(records, curve.fields, quantity) for curve in CURVES):
            found.append((title, svg(title, partial(draw_losses, records=records, quantity=quantity))))
    return found


def _rates(records: Records) -> list[tuple[str, str]]:
    """Charts against tokens of what a training record holds beside its loss."""
    found = []
    for number, (title, field, units) in enumerate(RATES, start=3):
        if points := thin_out(curve_points(records, {"train": field}, "tokens")):
            top = max(y for _, y in points)
            size, unit = next((known for known in units if top >= known[0]), units[-1])
            name = f"{title} ({unit})" if unit else title
            points = [(x, y / size) for x, y in points]
            found.append((name, svg(name, partial(_draw_rate, records=records, points=points, number=number))))
    return found


def _draw_rate(axes: Axes, records: Records, points: Sequence[Point], number: int) -> None:
    scale = label_axis(axes, points, "tokens")
    axes.plot([x / scale for x, _ in points], [y for _, y in points], color=COLOURS[number])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    mark_growths(axes, records, "tokens", scale)


def _speeds(trained: Records, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Median tokens per second of each stage."""
    rates: dict[int | None, list[float]] = {}
    for record in trained:
        if record.get("tokens_per_second") is not None:
            rates.setdefault(record.get("stage"), []).append(record["tokens_per_second"])
    return [count(median(rates[stage])) if stage in rates else "-" for stage in range(len(stages))]


def _growth_row(growth: Mapping[str, Any], later: Mapping[int | None, float | None]) -> tuple[str, ...]:
    return (
        growth_name(growth),
        str(growth.get("operator", "-")),
        str(growth.get("optimizer_state", "-")),
        f"{growth['seconds_growth']:.2f}" if growth.get("seconds_growth") is not None else "-",
        loss(growth.get("eval_loss_before")),
        loss(growth.get("eval_loss_after")),
        loss(later.get(growth.get("stage"))),
        str(growth.get("tensors_verified", "-")),
    )


def _blocks(records: Records) -> list[str]:
    """What the blocks of each growth look like afterwards."""
    parts = []
    for growth in observed_growths(records):
        stage, looks = growth.get("stage"), growth["observations"]
        name = "A stage" if stage is None else f"Stage {stage + 1}"
        parts.append(paragraph(f"{name}, {looks[0].get('layers', '?')} layers."))
        parts.append(charts((title.capitalize(), svg(title, draw)) for title, draw in growth_panels(growth).items()))
    return parts
