"""What became of a run's growths: copies and their originals, norms by block, losses and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ds_stacking.common.words import plain
from ds_stacking.reports.curves import Records, growth_name
from ds_stacking.reports.figure import COLOURS, DIM, Draw, draw_dots, draw_png

Growth = Mapping[str, Any]
COSINES = {
    "copy_cosine_master": ("weights", 1, "-"),
    "copy_cosine_exp_avg": ("first moment", 2, "--"),
    "copy_cosine_exp_avg_sq": ("second moment", 3, ":"),
}
"""For each field of an observation: its name in the legend, colour and line style."""
NORMS = {"weight_norm": "norm of a block's weights", "gradient_norm": "norm of a block's gradient"}
LOSSES = {"eval_loss_before": "before", "eval_loss_after": "after", "eval_loss_later": "later"}


def draw_growths(run_dir: str | Path, growths: Sequence[Growth]) -> Path | None:
    """Draw `run_dir`/report/growths.png, a row for each growth of a summary; None where none was looked at."""
    rows = [_row(growth) for growth in growths if growth["observations"]]
    run_dir = Path(run_dir)
    return draw_png(run_dir / "report" / "growths.png", rows, inside=run_dir) if rows else None


def observed_growths(records: Records) -> list[dict[str, Any]]:
    """The growths of a run whose blocks were looked at afterwards, with these `observations`, from its records."""
    found: dict[int | None, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "growth":
            found[record.get("stage")] = {**record, "observations": []}
        elif record["kind"] == "after_growth":
            growth = found.setdefault(record.get("stage"), {"stage": record.get("stage"), "observations": []})
            growth["observations"].append(record)
    return [growth for growth in found.values() if growth["observations"]]


def growth_panels(growth: Growth) -> dict[str, Draw]:
    """What can be drawn of a growth that was looked at, by what it shows."""
    looks = growth["observations"]
    panels: dict[str, Draw] = {}
    if any(_values(look, field) for look in looks for field in COSINES):
        panels["cosine of copy and original"] = partial(_draw_cosines, looks=looks)
    for field, title in NORMS.items():
        if known := [look for look in looks if _values(look, field)]:
            panels[title] = partial(_draw_norms, looks=known, field=field)
    if phases := {name: value for name, value in growth.get("seconds_by_phase", {}).items() if value is not None}:
        panels["seconds by phase"] = partial(_draw_seconds, phases=phases, moved=growth.get("bytes_moved"))
    return panels


def _row(growth: Growth) -> list[Draw]:
    """All panels with their titles, empty ones where there is nothing to show."""
    panels = growth_panels(growth)
    titles = ["cosine of copy and original", *NORMS.values(), "seconds by phase"]
    name = f"{growth_name(growth)} layers, {plain(growth['operator'], 60)}"
    losses = [f"{growth[key]:.3f} {word}" for key, word in LOSSES.items() if growth.get(key) is not None]
    above = [f"{name}\n{titles[0]}", *titles[1:3], f"held-out loss {', '.join(losses)}\n{titles[3]}"]
    return [partial(_titled, draw=panels.get(title), words=words) for title, words in zip(titles, above, strict=True)]


def _titled(axes: Axes, draw: Draw | None, words: str) -> None:
    axes.set_title(words, loc="left", fontsize=12, parse_math=False)
    if draw:
        draw(axes)


def _values(look: Mapping[str, Any], field: str) -> dict[int, float]:
    """What an observation holds for each block; those that are not known are left out."""
    return {int(block): value for block, value in (look.get(field) or {}).items() if value is not None}


def _draw_cosines(axes: Axes, looks: Records) -> None:
    """Mean over the copies, and the range that they span, against optimizer steps since the growth."""
    for field, (label, number, style) in COSINES.items():
        known = [(look.get("steps_since", 1), list(_values(look, field).values())) for look in looks]
        known = [(steps, found) for steps, found in known if found]
        if known:
            steps, found = zip(*known, strict=True)
            means = [sum(f) / len(f) for f in found]
            axes.plot(steps, means, color=COLOURS[number], ls=style, label=label)
            axes.fill_between(steps, [*map(min, found)], [*map(max, found)], color=COLOURS[number], alpha=0.16, lw=0)
            draw_dots(axes, list(zip(steps, means, strict=True)), number, label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("optimizer steps since the growth")
    axes.legend()


def _draw_norms(axes: Axes, looks: Records, field: str) -> None:
    """By block, at the first and the last look; dotted lines mark the seams."""
    for number, look in enumerate([looks[0], *looks[1:][-1:]]):
        points = sorted(_values(look, field).items())
        since = look.get("steps_since", "?")
        label = f"{since:,} step{'s' * (since != 1)} after" if since != "?" else "after"
        axes.plot(*zip(*points, strict=True), color=COLOURS[number], label=label)
        draw_dots(axes, [(float(block), value) for block, value in points], number, f"{label}, block")
    for seam in looks[0].get(f"{field}_jump") or {}:
        axes.axvline(int(seam) - 0.5, color=DIM, lw=1.0, ls=(0, (2, 3)))
    axes.set_ylim(0, 1.15 * axes.dataLim.y1 or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.legend()


def _draw_seconds(axes: Axes, phases: Mapping[str, float], moved: float | None) -> None:
    bars = axes.barh(range(len(phases)), list(phases.values()), color=COLOURS[1])
    axes.bar_label(bars, [plain(f"{name} {seconds:.2g} s", 40) for name, seconds in phases.items()], padding=4)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set_xlabel("seconds" if moved is None else f"seconds; {moved / 1e6:,.1f} MB written per rank")
