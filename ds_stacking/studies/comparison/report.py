"""The report of a comparison: one HTML page, one table, one JSON file, one picture, from the runs that there are.

Each of them begins with the conclusion in words.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_stacking.common.files import write_json, write_text
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside
from ds_stacking.common.words import plain
from ds_stacking.reports.figure import COLOURS
from ds_stacking.reports.page import charts, heading, legend, page, paragraph, strong, table
from ds_stacking.studies.comparison.charts import Curves, cost_charts, draw_comparison, read_curves
from ds_stacking.studies.comparison.conclusion import conclusion, depth_limits, disturbed_sentences
from ds_stacking.studies.comparison.effects import (
    COSTS,
    adjusted_gains,
    compared,
    depth_pays,
    gain,
    least_saving,
    pairs,
    places,
    power,
    saving,
    shallow_arms,
)
from ds_stacking.studies.comparison.provenance import provenance, tuned_rates
from ds_stacking.studies.comparison.results import Results, read_comparison
from ds_stacking.studies.comparison.statistics import Effect
from ds_stacking.studies.comparison.tables import RUNS, run_rows, tables


def write_comparison(folder: str | Path) -> str:
    """Write report.html, report.json, table.md and comparison.png into `folder`/report; returns the text of table.md.

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
            draw_comparison(results, curves, conclusion(results)[0], target / "comparison.png")
        write_text(target / "report.html", page, inside=folder)
    return f"{text}\n\nreport  {target / 'report.html'}"


def content(results: Results) -> dict[str, Any]:
    """Everything that the report says, as plain JSON values."""
    adjusted = adjusted_gains(results)
    arms = {
        arm: {
            "baseline": results.arms[arm]["baseline"],
            "gain": {cost: _effect(gain(results, arm, cost)) for cost in COSTS},
            "p_holm": adjusted.get(arm),
            "saving": {cost: _effect(saving(results, arm, cost)) for cost in COSTS},
            "least_saving": {cost: least_saving(results, arm, cost) for cost in COSTS},
            "places": places(results, arm),
            "power": asdict(need) if (need := power(results, arm)) else None,
        }
        for arm in compared(results)
    }
    return {
        "version": results.plan["version"],
        "conclusion": conclusion(results),
        "depth_pays": depth_pays(results),
        "depth": [asdict(check) | {"advantage": _effect(check.advantage)} for check in shallow_arms(results)],
        "provenance": provenance(results),
        "notes": notes(results),
        "finished": not (results.failed or results.missing),
        "clock": results.plan["clock"],
        "arms": arms,
        "pairs": [asdict(pair) | {"difference": _effect(pair.difference)} for pair in pairs(results)],
        "tuned_rates": [asdict(tuned) for tuned in tuned_rates(results)],
        "ends": [asdict(end) for end in results.ends],
        "tuning": [asdict(end) for end in results.tuning],
        "failed": results.failed,
        "missing": results.missing,
        "foreign": results.foreign,
        "untimed": results.untimed,
        "plan": results.plan,
    }


def _effect(effect: Effect) -> dict[str, Any]:
    return {"n": effect.n, **asdict(effect)}


def markdown(results: Results) -> str:
    """The report as Markdown: the conclusion, how it was made, the tables, and what failed or is missing."""
    said = [*conclusion(results), " ".join(provenance(results)), *notes(results)]
    for made in tables(results):
        lines = [made.headers, ["---"] * len(made.headers), *made.rows]
        said += [f"## {made.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(said)


def html(results: Results, curves: Curves) -> str:
    """The report as one page."""
    recipe = results.plan["recipe"]
    stages = ", ".join(f"{stage['layers']}:{stage['steps']}" for stage in recipe["stages"])
    first, *others = conclusion(results)
    parts = ["<h1>Does stacking pay?</h1>", strong(first), *map(paragraph, others)]
    parts += [
        heading("How it was made"),
        paragraph(f"Width {recipe['model']['hidden_size']}, stages {stages}. {' '.join(provenance(results))}"),
        *map(paragraph, notes(results)),
        heading("Loss against cost"),
        legend(
            (n % len(COLOURS), f"{arm}: {plain(plan['meaning'])}")
            for n, (arm, plan) in enumerate(results.arms.items())
        ),
        charts(cost_charts(results, curves)),
        paragraph(
            "Marks: mean ends, where the learning rate has fallen to 0; only these compare. Squares stay shallow, "
            "diamonds were given. Dashed: scratch between its budgets. Thin lines: mean over seeds while training, "
            "with the learning rate still high; bands from the lowest to the highest seed.",
            dim=True,
        ),
    ]
    for made in tables(results):
        parts += [heading(made.title), table(made.headers, made.rows), paragraph(made.meaning, dim=True)]
    return page("Does stacking pay?", [*parts, heading("All runs"), table(RUNS, run_rows(results))])


def notes(results: Results) -> list[str]:
    """Runs that failed, are missing, whose times are not used or whose FLOPs are not equal."""
    failed = [f"{path} failed: {reason}." for path, reason in results.failed.items()]
    failed += [f"{path} has no curve: {reason}." for path, reason in results.without_curve.items()]
    missing = [f"Not finished: {', '.join(results.missing)}."] if results.missing else []
    unequal = [pair for pair in pairs(results) if abs(pair.flops_ratio - 1) > 0.02]
    unequal_words = [
        f"The FLOPs of {pair.first} are {pair.flops_ratio:.3f} times those of {pair.second}: these two do not stand "
        f"at equal FLOPs; give more steps."
        for pair in unequal
    ]
    return [*failed, *missing, *depth_limits(results), *disturbed_sentences(results), *unequal_words]
