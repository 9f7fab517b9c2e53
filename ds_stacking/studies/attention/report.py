"""Figures of attention maps from an attention.json: where heads look, how alike layers are, how copies part.

Every figure is written as PNG and SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import whole_file
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.common.outputs import writing
from ds_stacking.common.words import plain

Record = Mapping[str, Any]
DARK, BLUE, ORANGE, GREY = "#333333", "#0072B2", "#D55E00", "#999999"
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Few = Annotated[int, Field(ge=1, le=10_000)]
Name = Annotated[str, Field(max_length=200)]
Matrix = list[list[Number]]


class Stage(TypedDict):
    """What was measured at the end of a stage."""

    name: Name
    layers: Few
    heads: Few
    mass: dict[str, Matrix]
    distances: Annotated[list[Number], Field(min_length=1)]
    profile: list[Matrix]
    js_divergence: Matrix


class Point(TypedDict):
    """How alike blocks and their copies were at one time."""

    name: Name
    js_divergence: list[Number]
    weight_cosine: list[Number]
    js_divergence_others: Number | None
    weight_cosine_others: Number | None


class Growth(TypedDict):
    """A growth, and how its copies parted."""

    from_layers: Few
    to_layers: Few
    pairs: list[list[int]]
    points: list[Point]


class Attention(TypedDict):
    """attention.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    neighbours: int
    stages: Annotated[list[Stage], Field(min_length=1, max_length=100)]
    growths: Annotated[list[Growth], Field(max_length=100)]


MASS_TITLES = {"cls": "on [CLS]", "sep": "on [SEP]", "self": "on itself", "neighbours": "on neighbours"}
SMALLEST_SCALE = 0.1
"""Bits at the dark end of the colours at least, so that rounding between equal layers does not look like a pattern."""
LAYER_COLOURS = matplotlib.colormaps["viridis"]


def draw_attention(folder: str | Path) -> list[Path]:
    """Draw all figures of `folder`/attention.json beside it.

    Raises UserError where that is missing or damaged, RunFailed where a figure cannot be written.
    """
    folder = Path(folder)
    record = read_attention(folder)
    written = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attention"}), writing(folder):
        figures = {
            "heads": draw_heads(record),
            "distances": draw_distances(record["stages"]),
            "layers": draw_layers(record["stages"]),
        }
        if record["growths"]:
            figures["copies"] = draw_copies(record["growths"])
        for name, figure in figures.items():
            for suffix in ("png", "svg"):
                written.append(folder / f"{name}.{suffix}")
                with whole_file(written[-1], inside=folder) as file:
                    figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    return written


def read_attention(folder: Path) -> Record:
    """What analyze_attention.py measured. Raises UserError where it is missing or damaged."""
    path, mend = folder / "attention.json", "run launchers/analyze_attention.py again"
    try:
        record = read_json(path, Attention, mend=mend, inside=folder)
    except OSError:
        raise UserError(f"{folder} has no attention.json; run launchers/analyze_attention.py first.") from None
    whole = all(_is_whole(stage) for stage in record["stages"]) and all(
        len(point[key]) == len(growth["pairs"])  # type: ignore[literal-required]
        for growth in record["growths"]
        for point in growth["points"]
        for key in ("js_divergence", "weight_cosine")
    )
    if not whole:
        raise UserError(f"{path} is damaged: its matrices are not as large as its layers and heads say; {mend}.")
    return record


def _is_whole(stage: Stage) -> bool:
    """Whether the matrices of a stage have the shapes that it names."""
    layers, heads, length = stage["layers"], stage["heads"], len(stage["distances"])
    profile = stage["profile"]
    return (
        all(_is(stage["mass"].get(target, []), layers, heads) for target in MASS_TITLES)
        and len(profile) == layers
        and all(_is(rows, heads, length) for rows in profile)
        and _is(stage["js_divergence"], layers, layers)
    )


def _is(matrix: Matrix, rows: int, columns: int) -> bool:
    return len(matrix) == rows and all(len(row) == columns for row in matrix)


def draw_heads(record: Record) -> Figure:
    """A map of layers and heads for each stage (rows) and each target of attention (columns)."""
    stages = record["stages"]
    heights = [max(2, stage["layers"]) for stage in stages]
    figure = Figure(figsize=(9, 1.2 + 0.36 * sum(heights)), dpi=160, layout="constrained")
    grid = figure.subplots(len(stages), len(MASS_TITLES), squeeze=False, height_ratios=heights)
    titles = {**MASS_TITLES, "neighbours": f"on neighbours (within {record['neighbours']})"}
    for place, (row, stage) in enumerate(zip(grid, stages, strict=True)):
        for axes, (target, title) in zip(row, titles.items(), strict=True):
            image = axes.imshow(stage["mass"][target], vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
            _whole_ticks(axes, stage["heads"], stage["layers"])
            if place == 0:
                axes.set_title(title, fontsize=10)
            if place == len(stages) - 1:
                axes.set_xlabel("head")
        row[0].set_ylabel(f"{_label(stage['name'])}\nlayer", fontsize=9)
    figure.colorbar(image, ax=grid, label="share of a head's attention", shrink=0.8, pad=0.01)
    return figure


def draw_distances(stages: Sequence[Record]) -> Figure:
    """Mean attention by relative distance, a line for each layer, a panel for each stage."""
    figure = Figure(figsize=(1.5 + 3.6 * len(stages), 3.6), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for axes, stage in zip(panels, stages, strict=True):
        profile = np.array(stage["profile"]).mean(1)  # over heads: [L, D]
        for layer, values in enumerate(profile):
            axes.plot(stage["distances"], values, color=_layer_colour(layer, stage["layers"]), lw=1.4)
        axes.set_yscale("log")
        axes.set_title(_label(stage["name"]), fontsize=10)
        axes.set_xlabel("distance of the token looked at")
        axes.grid(color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean attention per token")
    scale = matplotlib.cm.ScalarMappable(cmap=LAYER_COLOURS)
    bar = figure.colorbar(scale, ax=panels, ticks=[0, 1], pad=0.01)
    bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
    return figure


def draw_layers(stages: Sequence[Record]) -> Figure:
    """Jensen-Shannon divergence of every pair of layers, a panel for each stage, all with the same colours."""
    figure = Figure(figsize=(1.6 + 3.0 * len(stages), 3.3), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    largest = max(SMALLEST_SCALE, *(np.max(stage["js_divergence"]) for stage in stages))
    for axes, stage in zip(panels, stages, strict=True):
        matrix = np.array(stage["js_divergence"])
        image = axes.imshow(matrix, vmin=0, vmax=largest, cmap="magma_r", origin="lower")
        _whole_ticks(axes, stage["layers"], stage["layers"])
        axes.set_title(_label(stage["name"]), fontsize=10)
        axes.set_xlabel("layer")
        if stage["layers"] <= 12:
            for (a, b), value in np.ndenumerate(matrix):
                colour = "white" if value > 0.6 * largest else DARK
                axes.text(b, a, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color=colour)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="Jensen-Shannon divergence (bits)", pad=0.01)
    return figure


def draw_copies(growths: Sequence[Record]) -> Figure:
    """How a block and its copy part: attention above, weights below, a column for each growth."""
    figure = Figure(figsize=(1 + 3.8 * len(growths), 6), dpi=160, layout="constrained")
    grid = figure.subplots(2, len(growths), sharey="row", sharex="col", squeeze=False)
    rows = {"js_divergence": "divergence of attention (bits)", "weight_cosine": "cosine of weights"}
    for column, growth in enumerate(growths):
        for axes, key in zip(grid[:, column], rows, strict=True):
            _draw_pairs(axes, growth, key)
        grid[0, column].set_title(f"{growth['from_layers']} → {growth['to_layers']} layers", fontsize=10)
    for axes, label in zip(grid[:, 0], rows.values(), strict=True):
        axes.set_ylabel(label)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_pairs(axes: Axes, growth: Record, key: str) -> None:
    points = growth["points"]
    places = range(len(points))
    for number in range(len(growth["pairs"])):
        values = [point[key][number] for point in points]
        label = "a block and its copy" if number == 0 else None
        axes.plot(places, values, color=BLUE, marker="o", ms=3.5, lw=1.2, alpha=0.8, label=label)
    others = [point[f"{key}_others"] for point in points]
    if None not in others:
        axes.plot(places, others, color=ORANGE, ls="--", marker="s", ms=3.5, lw=1.6, label="mean of all other pairs")
    axes.set_xticks(places, [_label(point["name"]).replace("end of ", "end of\n") for point in points], fontsize=8)
    axes.margins(x=0.12)
    axes.set_ylim(bottom=min(0.0, *axes.get_ylim()))
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_ticks(axes: Axes, across: int, up: int) -> None:
    """Ticks at whole numbers, few enough to be read."""
    axes.set_xticks(range(0, across, 1 + across // 11))
    axes.set_yticks(range(0, up, 1 + up // 13))
    axes.tick_params(labelsize=7, length=2)


def _label(name: str) -> str:
    """A name that a figure shows as it is: between dollars, matplotlib reads mathematics."""
    return plain(name).replace("$", r"\$")


def _layer_colour(layer: int, layers: int) -> tuple[float, ...]:
    return LAYER_COLOURS(layer / max(1, layers - 1))
