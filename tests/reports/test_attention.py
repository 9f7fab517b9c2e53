"""Figures of attention maps: one of each kind as PNG and SVG, with all stages, layers and pairs in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ds_stacking.common.errors import UserError
from ds_stacking.reports.attention import draw_attention, draw_copies, draw_distances, draw_heads, draw_layers


def stage(layers: int, heads: int = 3) -> dict:
    rng = np.random.default_rng(layers)
    mass = {target: rng.random((layers, heads)).tolist() for target in ("cls", "sep", "self", "neighbours", "others")}
    return {
        "name": f"stage-{layers}L",
        "layers": layers,
        "heads": heads,
        "mass": mass,
        "distances": [-1, 0, 1],
        "profile": rng.random((layers, heads, 3)).tolist(),
        "js_divergence": rng.random((layers, layers)).tolist(),
    }


def record() -> dict:
    points = [
        {
            "name": name,
            "js_divergence": [0.1, 0.2],
            "weight_cosine": [1.0, 0.9],
            "js_divergence_others": 0.5,
            "weight_cosine_others": 0.0,
        }
        for name in ("as grown", "end of stage-4L")
    ]
    growth = {"from_layers": 2, "to_layers": 4, "operator": "stack", "pairs": [[0, 2], [1, 3]], "points": points}
    return {"neighbours": 2, "stages": [stage(2), stage(4)], "growths": [growth]}


def test_the_figures_show_everything() -> None:
    whole = record()
    heads = [axes for axes in draw_heads(whole).axes if axes.images]
    assert [axes.images[0].get_array().shape for axes in heads] == [(2, 3)] * 4 + [(4, 3)] * 4
    assert heads[0].get_title() == "on [CLS]" and heads[-1].get_xlabel() == "head"
    assert np.allclose(heads[5].images[0].get_array(), whole["stages"][1]["mass"]["sep"])
    lines = [len(axes.lines) for axes in draw_distances(whole["stages"]).axes if axes.get_xlabel()]
    assert lines == [2, 4]
    layers = draw_layers(whole["stages"]).axes
    assert len(layers[1].texts) == 16
    above, below = draw_copies(whole["growths"]).axes
    assert len(above.lines) == len(below.lines) == 3
    assert above.lines[1].get_ydata().tolist() == [0.2, 0.2]


def test_the_figures_are_written_as_png_and_svg(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention.json"):
        draw_attention(tmp_path)
    (tmp_path / "attention.json").write_text(json.dumps({**record(), "growths": []}))
    written = draw_attention(tmp_path)
    assert [path.name for path in written] == [
        f"{n}.{s}" for n in ("heads", "distances", "layers") for s in ("png", "svg")
    ]
    assert imread(written[0]).std() > 0.05
    assert "on [CLS]" in written[1].read_text(), "text in an SVG stays text"
