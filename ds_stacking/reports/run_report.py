"""The report of one run as one HTML page: the wandb dashboard without wandb, from metrics.jsonl and summary.json.

It can be written while the run goes on; what has not been measured yet is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_text
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside
from ds_stacking.common.words import shown
from ds_stacking.reports.closing import verdict
from ds_stacking.reports.curves import CURVES, UNITS, Records, axis_unit, growth_name
from ds_stacking.reports.page import cards, charts, heading, legend, page, paragraph, table
from ds_stacking.reports.run_files import read_metrics, read_run_name, read_summary
from ds_stacking.reports.svg import Chart, Line, Point, thin_out
from ds_stacking.reports.table import HEADERS, count, duration, flops, loss, stage_cells

LOSS_COLOURS = {"held-out": 1, "held-out, [MASK] positions only": 2, "training": 0}
RATES = (
    ("Tokens per second", "tokens_per_second", (1e6, "million"), (1e3, "thousand"), (1, "")),
    (
        "Model FLOP per second",
        "flops_per_second",
        (1e15, "PFLOP/s"),
        (1e12, "TFLOP/s"),
        (1e9, "GFLOP/s"),
        (1, "FLOP/s"),
    ),
    ("Model FLOPs utilisation", "mfu", (1, "")),
)
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
BLOCKS = (
    ("Norm of the weights by block", "weight_norm"),
    ("Norm of the gradient by block", "gradient_norm"),
    ("Cosine of a copy and its original", "copy_cosine_master"),
)
"""Fields of a record `after_growth` that hold a number for each block."""


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
    observed = [record for record in records if record["kind"] == "after_growth"]
    parts = [
        f"<h1>{escape(name)}</h1>",
        paragraph(_state(records, summary), dim=True),
        cards(_figures(records, summary)),
        *([paragraph(words)] if (words := verdict(summary)) else []),
    ]
    parts += [heading("Loss"), legend((colour, label) for label, colour in LOSS_COLOURS.items())]
    names = {"flops": "FLOPs"}
    parts += [
        charts((f"Against {names.get(quantity, quantity)}", _losses(records, growths, quantity)) for quantity in UNITS)
    ]
    if summary.get("stages"):
        headers = (*HEADERS, "tokens/s")
        rows = zip(stage_cells(summary["stages"]), _speeds(trained, summary["stages"]), strict=True)
        parts += [heading("Stages"), table(headers, ((*cells, speed) for cells, speed in rows))]
    if growths:
        later = {growth.get("stage"): growth.get("eval_loss_later") for growth in summary.get("growths", ())}
        parts += [heading("Growths"), table(GROWTHS, (_growth_row(growth, later) for growth in growths))]
    if observed:
        parts += [heading("Blocks after a growth"), *_blocks(observed)]
    parts += [heading("Speed and optimisation"), charts(_rates(trained, growths))]
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


def _losses(records: Records, growths: Records, quantity: str) -> str:
    lines = []
    for curve in reversed(CURVES):
        points = [
            (record[quantity], record[curve.fields[record["kind"]]])
            for record in records
            if record.get(curve.fields.get(record["kind"], "")) is not None and record.get(quantity) is not None
        ]
        lines.append(
            Line(
                points=thin_out(points),
                colour=LOSS_COLOURS[curve.label],
                style="thin" if curve.label == "training" else "",
                dots=curve.label != "training" and len(points) <= 40,
                label=curve.label,
            )
        )
    return _chart(lines, growths, quantity, f"loss against {quantity}")


def _chart(lines: Sequence[Line], growths: Records, quantity: str, title: str, *, from_zero: bool = False) -> str:
    """A chart over one of UNITS with every growth marked."""
    end = max((x for line in lines for x, _ in line.points), default=1.0)
    scale, unit = axis_unit(quantity, end)
    places = [growth for growth in growths if growth.get(quantity) is not None]
    marks = [(growth[quantity], f"{growth_name(growth)} layers") for growth in places]
    return Chart(lines=lines, title=title, x_label=unit, x_scale=scale, marks=marks, from_zero=from_zero).svg()


def _rates(trained: Records, growths: Records) -> list[tuple[str, str]]:
    """Charts against tokens of what a training record holds beside its loss."""
    figures = []
    for title, field, *units in RATES:
        points = _points(trained, field)
        top = max((y for _, y in points), default=0.0)
        scale, unit = next(((scale, unit) for scale, unit in units if top >= scale), units[-1])
        lines = [Line(points=[(x, y / scale) for x, y in points], colour=3, label=title)]
        name = f"{title} ({unit})" if unit else title
        figures.append((name, _chart(lines, growths, "tokens", name, from_zero=True)))
    for title, field, colour in (("Learning rate", "lr", 4), ("Gradient norm before clipping", "grad_norm", 5)):
        lines = [Line(points=_points(trained, field), colour=colour, label=title)]
        figures.append((title, _chart(lines, growths, "tokens", title, from_zero=True)))
    return figures


def _points(records: Records, field: str) -> list[Point]:
    known = [record for record in records if record.get(field) is not None and record.get("tokens") is not None]
    return thin_out([(record["tokens"], record[field]) for record in known])


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


def _blocks(observed: Records) -> list[str]:
    """For each growth, what its blocks look like at the first and at the last look; copies over time."""
    parts: list[str] = []
    by_stage: dict[int | None, list[Mapping[str, Any]]] = {}
    for record in observed:
        by_stage.setdefault(record.get("stage"), []).append(record)
    for stage, own in by_stage.items():
        looks = [own[0], own[-1]]
        steps = [look.get("steps_since", "?") for look in looks]
        figures = []
        for title, field in BLOCKS:
            lines = [
                Line(
                    points=sorted((float(b), value) for b, value in look.get(field, {}).items() if value is not None),
                    colour=colour,
                    dots=True,
                    label=f"{since} steps after, block",
                )
                for look, since, colour in zip(looks, steps, (0, 1), strict=True)
            ]
            figures.append((title, Chart(lines=lines, title=title, x_label="block", from_zero=True).svg()))
        names = [f"{since} step{'s' * (since != 1)} after" for since in steps]
        title = "A stage" if stage is None else f"Stage {stage + 1}"
        parts += [paragraph(f"{title}, {own[0].get('layers', '?')} layers."), legend(zip((0, 1), names, strict=True))]
        parts.append(charts(figures))
    return parts
