"""Panels as inline SVG: the page's colours and font, nothing loaded, the same each time, and places of points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from ds_stacking.reports.figure import COLOURS, THEME, draw_dots, draw_png, limit_loss, mark_places, svg, thin_out


def draw(axes: Axes) -> None:
    axes.plot([0, 10], [1.0, 2.0], color=COLOURS[1], label="rising")
    draw_dots(axes, [(0.0, 1.0), (10.0, 2.25)], 1, "a<b")
    mark_places(axes, [(5.0, "2 → 4")])
    axes.set_xlabel("steps")
    axes.legend()


def test_an_svg_has_the_pages_colours_and_loads_nothing() -> None:
    content = svg("rise & fall", draw)
    assert content.startswith('<svg viewBox="0 0 420 270"') and 'aria-label="rise &amp; fall"' in content
    assert "<title>a&lt;b 2.25</title>" in content and ">2 → 4</text>" in content and ">steps</text>" in content
    assert not re.findall("#[0-9a-f]{6}[^0-9a-f]|http|font-family|<style|<metadata|<a |<!--", content)
    assert {"c1", "dim", "rule", "card"} <= set(re.findall(r"var\(--(\w+)\)", content))
    assert set(re.findall(r'(?:url\(|href=")#(\w+)', content)) == set(re.findall(r'id="(\w+)"', content))
    assert content == svg("rise & fall", draw), "the same each time"
    assert len(content) < 8000


def test_points_lie_where_they_belong() -> None:
    places = re.findall(r'<use href="#C[^"]*" x="([0-9.]+)" y="([0-9.]+)"', svg("t", draw))
    (x, y), (right, up) = [(float(x), float(y)) for x, y in places]
    assert x < right and y > up, "more is right and up"


def test_light_colours_tell_their_names() -> None:
    assert len({light for light, _ in THEME.values()}) == len(THEME)
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for pair in THEME.values() for colour in pair)


def test_panels_stand_in_one_picture_and_a_link_is_not_followed(tmp_path: Path) -> None:
    one = draw_png(tmp_path / "report" / "one.png", [[draw]], title="$\\frac$", inside=tmp_path)
    four = draw_png(tmp_path / "report" / "four.png", [[draw, draw], [draw, draw]], label="loss", inside=tmp_path)
    assert imread(four).shape[1] == pytest.approx(2 * imread(one).shape[1], abs=2)
    assert imread(one)[..., :3].std() > 0.05
    (tmp_path / "precious").write_text("precious")
    one.unlink()
    one.symlink_to(tmp_path / "precious")
    draw_png(one, [[draw]], inside=tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    "points", [[(1.0, 3.0)], [(0.0, 0.0)], [(0.0, 5.0), (10.0, 5.0)], [(1e39, -1e39), (0.0, 1e39)]]
)
def test_any_losses_have_limits(points: list[tuple[float, float]]) -> None:
    axes = Figure().subplots()
    limit_loss(axes, points)
    low, high = axes.get_ylim()
    assert low < min(y for _, y in points) or low < high


def test_the_steep_beginning_may_lie_above() -> None:
    axes = Figure().subplots()
    limit_loss(axes, [(0.0, 100.0), (5.0, 6.0), (10.0, 5.0)])
    assert 6 < axes.get_ylim()[1] < 7 and 4.9 < axes.get_ylim()[0] < 5


def test_long_lines_are_thinned() -> None:
    points = thin_out([(float(i), 1.0) for i in range(1000)], most=100)
    assert len(points) == 100 and points[0] == (4.5, 1.0)
