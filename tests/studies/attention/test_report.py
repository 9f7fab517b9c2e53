"""Figures of attention maps: one of each kind as PNG and SVG, with all stages, layers and pairs in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ds_stacking.common.errors import UserError
from ds_stacking.studies.attention.report import draw_attention, draw_copies, draw_distances, draw_heads, draw_layers


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


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("neighbours",), "x", "neighbours"),
        (("stages",), [], "stages: list should have at least 1 item"),
        (("stages", 0, "layers"), 10**9, "stages.0.layers"),
        (("stages", 0, "layers"), 3, "its matrices are not as large"),
        (("stages", 0, "mass"), {}, "its matrices are not as large"),
        (("stages", 0, "profile", 0), [[0.1]], "its matrices are not as large"),
        (("stages", 0, "js_divergence", 0, 0), float("nan"), "finite number"),
        (("stages", 0, "distances"), [], "distances"),
        (("growths", 0, "points", 0, "weight_cosine"), [1.0], "its matrices are not as large"),
        (("growths", 0, "pairs"), "x", "growths.0.pairs"),
    ],
)
def test_a_damaged_record_is_one_sentence(tmp_path: Path, place: tuple, value: object, message: str) -> None:
    content = record()
    *inner, last = place
    target = content
    for key in inner:
        target = target[key]
    target[last] = value
    (tmp_path / "attention.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        draw_attention(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["attention.json"]


def test_any_name_is_drawn_as_it_is_and_no_link_is_written_through(tmp_path: Path) -> None:
    content = record()
    content["stages"][0]["name"] = "<script>$\\frac$\x1b\n"
    content["growths"][0]["points"][0]["name"] = "$x$ {"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attention.json").write_text(json.dumps(content))
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / "heads.svg").symlink_to(tmp_path / "precious")
    draw_attention(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"
    drawn = (tmp_path / "run" / "heads.svg").read_text()
    assert "&lt;script&gt;$\\frac$" in drawn and "<script" not in drawn
    (tmp_path / "run" / "attention.json").rename(tmp_path / "attention.json")
    (tmp_path / "run" / "attention.json").symlink_to(tmp_path / "attention.json")
    with pytest.raises(UserError, match="is a link"):
        draw_attention(tmp_path / "run")
