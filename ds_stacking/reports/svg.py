"""Line charts as inline SVG, coloured by the page's style sheet, so that they follow its dark and light theme.

A chart is drawn for the width of a phone; a wide page shows several side by side. No script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 420, 270
SMALLEST = 1e-12
"""Relative to the values, or absolute: what is shorter is no range that an axis could show."""
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
Shape = Literal["circle", "square", "diamond"]
SHAPES = {"square": "m-4 -4h8v8h-8", "diamond": "m0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5"}
"""Paths of dots that are no circles, from their middle."""
Point = tuple[float, float]


@dataclass(kw_only=True)
class Line:
    """One line of a chart."""

    points: Sequence[Point]
    """Its points, in the data's units."""
    colour: int
    """Number of its colour in the style sheet (c0, c1, ...)."""
    label: str = ""
    """Shown when a dot is pointed at."""
    band: Sequence[tuple[float, float, float]] = ()
    """x, lower and upper end of a band around it."""
    dots: bool = False
    """Mark the points with dots."""
    style: str = ""
    """A further class of the style sheet, such as `thin` or `dashed`."""
    shape: Shape = "circle"
    """What its dots are."""


@dataclass(kw_only=True)
class Chart:
    """A chart with its axes."""

    lines: Sequence[Line]
    """What is drawn, the last on top."""
    title: str
    """Its name, read out by screen readers."""
    x_label: str
    """Under the horizontal axis, with the unit."""
    x_scale: float = 1.0
    """One unit of the horizontal axis in the data's units."""
    marks: Sequence[tuple[float, str]] = ()
    """Vertical lines: place and text."""
    levels: Sequence[tuple[float, str]] = ()
    """Horizontal lines, which the vertical axis reaches: place and text."""
    from_zero: bool = False
    """Whether the vertical axis begins at 0; else it is as long as the lines need without their first part."""
    _x: tuple[float, float] = field(init=False, default=(0.0, 1.0))
    _y: tuple[float, float] = field(init=False, default=(0.0, 1.0))

    def svg(self) -> str:
        """The chart as an SVG element."""
        points = [point for line in self.lines for point in line.points if math.isfinite(point[1])]
        if not points:
            return ""
        widest = max(x for x, _ in points)
        self._x = (0.0, widest if widest > SMALLEST else 1.0)
        self._y = self._range(points)
        inner = self._axes() + "".join(map(self._mark, self.marks)) + "".join(map(self._level, self.levels))
        inner += "".join(map(self._line, self.lines))
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">'
            f"<title>{escape(self.title)}</title>{inner}</svg>"
        )

    def _range(self, points: Sequence[Point]) -> tuple[float, float]:
        """The vertical range: the first tenth of a curve, where a loss falls steeply, may lie above it."""
        later = [y for x, y in points if x >= 0.1 * self._x[1]] or [y for _, y in points]
        later += [y for y, _ in self.levels]
        low, high = (0.0 if self.from_zero else min([*later, *(y for _, y in points)])), max(later)
        margin = 0.06 * (high - low)
        if margin <= SMALLEST * max(1.0, abs(high)):  # a flat line, or one that lies below 0 where 0 is the floor
            margin = 0.05 * abs(high) or 1.0
        return (min(low, high) if self.from_zero else low - margin, max(low, high) + margin)

    def _place(self, x: float, y: float) -> str:
        """Data to pixels; what lies above the chart is held at its edge."""
        across = LEFT + (x - self._x[0]) / (self._x[1] - self._x[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - self._y[0]) / (self._y[1] - self._y[0]) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{max(TOP, HEIGHT - BOTTOM - up):.1f}"

    def _axes(self) -> str:
        parts = []
        for value in ticks(*self._y):
            x, y = self._place(0, value).split(",")
            parts.append(f'<path class="grid" d="M{x} {y}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" class="end">{value:g}</text>')
        for value in ticks(0, self._x[1] / self.x_scale):
            x, _ = self._place(value * self.x_scale, self._y[0]).split(",")
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" class="middle">{value:g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{escape(self.x_label)}</text>')
        return "".join(parts)

    def _mark(self, mark: tuple[float, str]) -> str:
        x, _ = self._place(mark[0], self._y[0]).split(",")
        return (
            f'<path class="mark" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<text x="{float(x) + 4:.1f}" y="{TOP + 10}" class="small">{escape(mark[1])}</text>'
        )

    def _level(self, level: tuple[float, str]) -> str:
        _, y = self._place(0, level[0]).split(",")
        return (
            f'<path class="mark" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{float(y) - 4:.1f}" class="small end">{escape(level[1])}</text>'
        )

    def _line(self, line: Line) -> str:
        parts, places = [], [self._place(x, y) for x, y in line.points if math.isfinite(y)]
        if line.band:
            upper = [self._place(x, high) for x, _, high in line.band]
            lower = [self._place(x, low) for x, low, _ in reversed(line.band)]
            parts.append(f'<polygon class="band c{line.colour}" points="{" ".join(upper + lower)}"/>')
        if len(places) > 1:
            parts.append(f'<polyline class="line c{line.colour} {line.style}" points="{" ".join(places)}"/>')
        if line.dots:
            for place, (_, y) in zip(places, line.points, strict=False):
                x, up = place.split(",")
                title = f"<title>{escape(line.label)} {y:.4g}</title>"
                if line.shape == "circle":
                    parts.append(f'<circle class="dot c{line.colour}" cx="{x}" cy="{up}" r="4">{title}</circle>')
                else:
                    parts.append(f'<path class="dot c{line.colour}" d="M{x} {up}{SHAPES[line.shape]}z">{title}</path>')
        return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thin_out(points: Sequence[Point], most: int = 200) -> list[Point]:
    """At most about `most` of the points, each the mean of its neighbours, so that a page stays small."""
    size = max(1, len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
