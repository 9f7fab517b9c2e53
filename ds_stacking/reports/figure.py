"""Drawing: a panel is drawn once with matplotlib, for a PNG beside others or as inline SVG in the page's colours.

All panels have one size and one look, made for the width of a phone; a page shows several side by side. In a page
their colours are variables of its style sheet, so that they follow its dark and light theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ds_stacking.common.files import whole_file
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside

THEME = {
    "ground": ("#ffffff", "#14181d"), "text": ("#1b1f24", "#e6eaef"), "dim": ("#5b6471", "#9aa5b1"),
    "rule": ("#dfe3e8", "#2d343c"), "card": ("#f5f7f9", "#1c2229"), "c0": ("#5b6470", "#aeb8c2"),
    "c1": ("#0072b2", "#56b4e9"), "c2": ("#c24e00", "#ff8f4d"), "c3": ("#00805d", "#34c79a"),
    "c4": ("#a8518a", "#e39ac8"), "c5": ("#946200", "#e6b23c"), "c6": ("#c4254e", "#ff7a95"),
    "c7": ("#0a7f8e", "#45cddd"), "c8": ("#6a4fc9", "#ab9bff"), "c9": ("#5f7d00", "#a9cf45"),
}  # fmt: skip
"""Colours by their name in the style sheet: light, dark; no light one twice, since an SVG tells them by it."""
COLOURS = [light for name, (light, _) in THEME.items() if re.fullmatch("c[0-9]", name)]
"""Of lines, the first grey; the colour-blind tell 1 to 5 apart."""
DIM, RULE, CARD = (THEME[name][0] for name in ("dim", "rule", "card"))
WIDTH, HEIGHT = 420, 270
"""Of a panel, in points."""
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), DIM),
    **{"font.size": 12.0, "legend.frameon": False, "legend.fontsize": 11.0, "lines.linewidth": 1.8},
    **{
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "ytick.major.size": 0.0,
        "axes.labelsize": 12.0,
    },
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE},
    **{"svg.fonttype": "none", "svg.hashsalt": "ds_stacking"},
}
Draw = Callable[[Axes], None]
Point = tuple[float, float]


def styled() -> AbstractContextManager[None]:
    """Within, matplotlib draws in this look."""
    return matplotlib.rc_context(STYLE)


def draw_png(path: Path, rows: Sequence[Sequence[Draw]], *, label: str = "", title: str = "", inside: Path) -> Path:
    """Write panels as `path`: `label` names the height of each row's first, `title` stands above all.

    Names of lines come from the first panel of a row, unless a panel has a legend of its own.
    """
    across = len(rows[0])
    with styled(), writing(path):
        size = (across * WIDTH / 72, (len(rows) * HEIGHT + 40) / 72)
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        for row, draws in zip(figure.subplots(len(rows), across, squeeze=False), rows, strict=True):
            for axes, draw in zip(row, draws, strict=True):
                _draw(axes, draw)
            row[0].set_ylabel(label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles and figure.axes[0].get_legend() is None:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * across))
        if title:
            figure.suptitle(title, fontsize=12, parse_math=False)
        make_inside(inside, *path.parent.relative_to(inside).parts)
        with whole_file(path, inside=inside) as file:
            figure.savefig(file, format="png")
    return path


def svg(title: str, draw: Draw) -> str:
    """One panel as an SVG element of a page; screen readers say its `title`."""
    file = io.StringIO()
    with styled():
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.subplots_adjust(left=54 / WIDTH, right=1 - 12 / WIDTH, bottom=42 / HEIGHT, top=1 - 14 / HEIGHT)
        _draw(figure.subplots(), draw)
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue(), title)


def _draw(axes: Axes, draw: Draw) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    draw(axes)


def _inline(content: str, title: str) -> str:
    """A file of matplotlib's as an element: the page's font and colours, no names that two figures could share.

    An address of matplotlib's, which is how it lets a point say something, becomes the words shown when it is pointed
    at. Names of clips and marks stay: they are made of what they hold.
    """
    for pattern, replacement in (
        (r"^.*?<svg[^>]*>", ""),
        (r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|</svg>\s*$", ""),
        (r'<g id="[^"]*"', "<g"),
        (r"font-family: [^;\"]*(; )?| transform=\"rotate\(-0 [^\"]*\"", ""),
        (r'<a xlink:href="([^"]*)"[^>]*>(.*?)</a>', r"<g><title>\1</title>\2</g>"),
        ("xlink:href", "href"),
        (r">\s+<", "><"),
    ):
        content = re.sub(pattern, replacement, content, flags=re.DOTALL)
    content = re.sub("<[^>]*>", lambda tag: re.sub(r"(\.\d)\d+", r"\1", re.sub(r"\s+", " ", tag[0])), content)
    for name, (light, _) in THEME.items():
        content = content.replace(light, f"var(--{name})")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{content}</svg>'


def draw_dots(axes: Axes, points: Sequence[Point], number: int, label: str, *, marker: str = "o") -> None:
    """Dots in the colour `number`; each says `label` and its value where it is pointed at."""
    xs, ys = zip(*points, strict=True)
    dots = axes.scatter(xs, ys, s=45, color=COLOURS[number], edgecolor=CARD, lw=0.9, marker=marker, zorder=3)
    dots.set_urls([f"{label} {y:.4g}" for _, y in points])


def mark_places(axes: Axes, places: Iterable[tuple[float, str]]) -> None:
    """Dotted vertical lines with their names below the curves, and every second stretch between them shaded."""
    marks = sorted(places)
    for place, name in marks:
        axes.axvline(place, color=DIM, lw=1.0, ls=(0, (2, 3)), zorder=1)
        axes.annotate(name, (place, 0), (3, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      rotation=90, va="bottom", fontsize=11)  # fmt: skip
    edges = [*(place for place, _ in marks), axes.get_xlim()[1]]
    for left, right in list(zip(edges, edges[1:], strict=False))[::2]:
        axes.axvspan(left, right, color=RULE, alpha=0.35, lw=0, zorder=0)


def limit_loss(axes: Axes, points: Sequence[Point], held_out: Sequence[Point] = ()) -> None:
    """Axes from 0 across, and as high as the losses need without their first tenth, which falls steeply.

    Of those that are `held_out`, which are few, only the first fiftieth may be left out.
    """
    widest = max(x for x, _ in points)
    seen = [y for x, y in points if x >= 0.1 * widest] + [y for x, y in held_out if x >= 0.02 * widest]
    low, high = min(y for _, y in points), max(seen)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set(xlim=(0, 1.015 * widest or 1.0), ylim=(low - margin, high + margin))


def thin_out(points: Sequence[Point], most: int = 200) -> list[Point]:
    """At most about `most` of the points, each the mean of its neighbours, so that a page stays small."""
    size = max(1, len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
