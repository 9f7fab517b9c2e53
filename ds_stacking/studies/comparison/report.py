"""The report of a comparison: one HTML page, one table, one JSON file, one picture, from the runs that there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json, write_text
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside
from ds_stacking.common.words import plain
from ds_stacking.reports.curves import axis_unit
from ds_stacking.reports.page import charts, heading, legend, page, paragraph, table
from ds_stacking.reports.run_files import read_metrics
from ds_stacking.reports.svg import Chart, Line, Point
from ds_stacking.reports.table import count, duration, flops
from ds_stacking.studies.comparison.figure import CLOCKS, draw_comparison
from ds_stacking.studies.comparison.results import SECONDS, Effect, End, Results, label_of, read_comparison

COSTS = ("flops", "tokens", "seconds")
HEADERS = (
    *("arm", "seeds", "loss", "FLOPs", "time"),
    *("gain at equal FLOPs", "FLOPs saved", "loss, equal time", "gain at equal time", "time saved"),
)
Curves = dict[tuple[str, str], list[Point]]
"""(Run, cost) -> cost and loss of its evaluations, by rising cost."""
GRID = 60
"""Points of a mean curve."""


def write_comparison(folder: str | Path) -> str:
    """Write report.html, report.json, table.md and comparison.png into `folder`/report; returns the table as text.

    Whatever has finished is reported, and what failed or is missing is named. Raises UserError where there is no
    comparison in `folder`, RunFailed where the report cannot be written.
    """
    results = read_comparison(folder)
    folder, target = results.folder, results.folder / "report"
    curves = read_curves(results)
    text, page = markdown(results), html(results, curves)
    with writing(target):
        make_inside(folder, "report")
        write_text(target / "table.md", text + "\n", inside=folder)
        write_json(target / "report.json", content(results), inside=folder)
        if results.ends:
            draw_comparison(results, target / "comparison.png")
        write_text(target / "report.html", page, inside=folder)
    return f"{text}\n\nreport  {target / 'report.html'}"


def read_curves(results: Results) -> Curves:
    """For every finished run, its evaluations by each cost; a run whose metrics are damaged has failed."""
    curves: Curves = {}
    fields = {"flops": "flops", "tokens": "tokens", "seconds": SECONDS[results.plan["clock"]]}
    for end in results.ends:
        name = _name(end)
        try:
            records = [record for record in read_metrics(results.folder / name) if record["kind"] == "eval"]
        except UserError as error:
            results.without_curve[name] = plain(str(error)).rstrip(".")
            continue
        for cost, field in fields.items():
            known = [r for r in records if field in r and "eval_loss_masked" in r]
            curves[name, cost] = sorted((r[field], r["eval_loss_masked"]) for r in known)
    return curves


def content(results: Results) -> dict[str, Any]:
    """Everything that the report says, as plain JSON values."""
    grown = [arm for arm in results.plan["arms"] if arm != "scratch"]
    effects = {
        arm: {
            "saving": {cost: asdict(results.saving(arm, cost)) for cost in COSTS},
            "least_saving": {cost: results.least_saving(arm, cost) for cost in COSTS},
            "gain": {cost: asdict(results.gain(arm, cost)) for cost in COSTS},
        }
        for arm in grown
    }
    ends = [asdict(end) for end in results.ends]
    return {
        "finished": not (results.failed or results.missing),
        "clock": results.plan["clock"],
        "effects": effects,
        "ends": ends,
        "failed": results.failed,
        "missing": results.missing,
        "plan": results.plan,
    }


def rows(results: Results) -> list[tuple[str, ...]]:
    """The table under HEADERS: scratch's budgets, then one row for each other arm."""
    cells = [
        (f"scratch {label}", *_ends(results.of("scratch", label).values()), *"-----")
        for label in _labels(results, "scratch", "flops")
    ]
    for arm in results.plan["arms"]:
        if arm == "scratch":
            continue
        timed = [end.loss for end in results.of(arm, "time").values()]
        cells.append(
            (
                arm,
                *_ends(results.of(arm, "flops").values()),
                nats(results.gain(arm, "flops")),
                saving(results, arm, "flops"),
                f"{np.mean(timed):.3f}" if timed else "-",
                nats(results.gain(arm, "seconds")),
                saving(results, arm, "seconds"),
            )
        )
    return cells


def markdown(results: Results) -> str:
    """The table as Markdown, with what failed or is missing under it."""
    lines = [HEADERS, ["---"] * len(HEADERS), *rows(results)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([text, *(f"\n{line}" for line in _notes(results))])


def html(results: Results, curves: Curves) -> str:
    """The report as one page."""
    recipe = results.plan["recipe"]
    stages = ", ".join(f"{stage['layers']}:{stage['steps']}" for stage in recipe["stages"])
    seeds = len({end.seed for end in results.ends})
    colours = list(enumerate(results.plan["arms"]))
    return page(
        "Does stacking pay?",
        [
            "<h1>Does stacking pay?</h1>",
            paragraph(
                f"{seeds} seed{'s' * (seeds != 1)}, width {recipe['model']['hidden_size']}, stages {stages}, "
                f"data {recipe['data']}; "
                f"seconds are {CLOCKS[results.plan['clock']]} of training and growth, start, evaluations and "
                f"checkpoints left out."
            ),
            *map(paragraph, _notes(results)),
            heading("Results"),
            table(HEADERS, rows(results)),
            paragraph(
                "Loss is the held-out loss on [MASK] positions in nats, mean over seeds. Gain is how far an arm lies "
                "below scratch at the same cost, saving what it spends less than scratch at the same loss; in "
                "brackets 95 % t-intervals of the differences, seed by seed. Scratch between two budgets is "
                "interpolated; where its budgets do not enclose the value in every seed, the seeds stand one by one, "
                "“outside” for those; and “>” that no budget of scratch reached the arm's loss in any seed.",
                dim=True,
            ),
            heading("Loss against cost"),
            legend((colour, f"{arm}: {results.plan['arms'][arm]}") for colour, arm in colours),
            charts(_charts(results, curves)),
            paragraph(
                "Thin lines: mean over seeds while training, with the learning rate still high; bands from the lowest "
                "to the highest seed. Dots: the ends, where it has fallen to 0; only these compare. Dashed: scratch "
                "between its budgets.",
                dim=True,
            ),
            heading("All runs"),
            table(("run", "loss", "steps", "tokens", "FLOPs", "time"), map(_run_row, results.ends)),
        ],
    )


def nats(effect: Effect) -> str:
    """A difference of losses with its interval."""
    return _with_interval(effect, 1.0, "{:+.3f}")


def saving(results: Results, arm: str, cost: str) -> str:
    """A saving in percent with its interval, or what it is at the least."""
    least, effect = results.least_saving(arm, cost), results.saving(arm, cost)
    if least is not None:
        return f"> {100 * least:.0f} %"
    return _with_interval(effect, 100.0, "{:+.1f}") + (" %" if any(v is not None for v in effect.values) else "")


def _with_interval(effect: Effect, scale: float, form: str) -> str:
    if effect.mean is None:
        return ", ".join("outside" if v is None else form.format(scale * v) for v in effect.values) or "-"
    text = form.format(scale * effect.mean)
    if effect.low is None or effect.high is None:
        return text
    return f"{text} [{form.format(scale * effect.low)}, {form.format(scale * effect.high)}]"


def _ends(ends: Iterable[End]) -> tuple[str, ...]:
    ends = list(ends)
    if not ends:
        return ("0", "-", "-", "-")
    losses = [end.loss for end in ends]
    spread = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
    return (
        str(len(ends)),
        f"{np.mean(losses):.3f}{spread}",
        flops(float(np.mean([end.flops for end in ends]))),
        duration(float(np.mean([end.seconds for end in ends]))),
    )


def _notes(results: Results) -> list[str]:
    failed = [f"{path} failed: {reason}." for path, reason in results.failed.items()]
    failed += [f"{path} has no curve: {reason}." for path, reason in results.without_curve.items()]
    missing = [f"Not finished: {', '.join(results.missing)}."] if results.missing else []
    by_data: dict[str, set[int]] = {}
    for end in results.ends:
        by_data.setdefault(end.data, set()).add(end.seed)
    seeds = "; ".join(
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}" for seeds in by_data.values()
    )
    mixed = [f"The data changed between runs ({seeds}); only runs on the same data are compared with each other."]
    return [*failed, *missing, *(mixed if len(by_data) > 1 else [])]


def _run_row(end: End) -> tuple[str, ...]:
    return (_name(end), f"{end.loss:.4f}", str(end.steps), count(end.tokens), flops(end.flops), duration(end.seconds))


def _name(end: End) -> str:
    """The run's name, which is that of its directory."""
    return f"{end.arm}/{end.label}/seed-{end.seed}"


def _charts(results: Results, curves: Curves) -> list[tuple[str, str]]:
    names = {"flops": "FLOPs", "tokens": "tokens", "seconds": "seconds"}
    return [(f"Loss against {names[cost]}", _chart(results, curves, cost)) for cost in COSTS]


def _chart(results: Results, curves: Curves, cost: str) -> str:
    end = max((getattr(end, cost) for end in results.ends), default=1.0)
    scale, unit = axis_unit(cost, end)
    unit = unit.replace("wall clock", CLOCKS[results.plan["clock"]])
    lines: list[Line] = []
    for colour, arm in enumerate(results.plan["arms"]):
        for label in _labels(results, arm, cost):
            found = [curves.get((_name(end), cost), []) for end in results.of(arm, label).values()]
            lines += _curve([points for points in found if points], colour)
        lines += _ends_of(results, arm, cost, colour)
    return Chart(lines=lines, title=f"loss against {cost}", x_label=unit, x_scale=scale).svg()


def _curve(curves: list[list[Point]], colour: int) -> list[Line]:
    """The mean curve of one arm and budget, with a band over seeds; none where the seeds have no part in common."""
    if not curves or not (first := max(c[0][0] for c in curves)) < (last := min(c[-1][0] for c in curves)):
        return []
    grid = np.linspace(first, last, GRID)
    losses = np.array([np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    points = list(zip(grid.tolist(), losses.mean(0).tolist(), strict=True))
    band = list(zip(grid.tolist(), losses.min(0).tolist(), losses.max(0).tolist(), strict=True))
    return [Line(points=points, band=band if len(curves) > 1 else (), colour=colour, style="thin")]


def _labels(results: Results, arm: str, cost: str) -> list[str]:
    """Labels of the runs that tell about a cost: all budgets of scratch, rising, or one of another arm."""
    if arm != "scratch":
        return [label_of(cost)]
    return sorted({end.label for end in results.ends if end.arm == arm}, key=lambda label: float(label[1:]))


def _ends_of(results: Results, arm: str, cost: str, colour: int) -> list[Line]:
    """Dots at an arm's mean ends; scratch's are joined."""
    groups = [list(results.of(arm, label).values()) for label in _labels(results, arm, cost)]
    points = [
        (float(np.mean([getattr(end, cost) for end in ends])), float(np.mean([end.loss for end in ends])))
        for ends in groups
        if ends
    ]
    return [Line(points=points, colour=colour, label=arm, dots=True, style="dashed")] if points else []
