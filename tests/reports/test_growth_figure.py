"""The figure of growths: its curves are the observations', and it is drawn without a growth that was looked at."""

from __future__ import annotations

from pathlib import Path

from ds_stacking.reports.growth_figure import build_figure, draw_growths


def observation(steps: int, cosine: float, **gradient: float) -> dict:
    return {
        "steps_since": steps,
        "weight_norm": {"0": 2.0, "1": 3.0},
        "weight_norm_jump": {"1": 1.5},
        "gradient_norm": gradient,
        "gradient_norm_jump": {"1": 0.5} if gradient else {},
        "copy_cosine_master": {"1": cosine},
        "copy_cosine_exp_avg": {"1": None},
        "copy_cosine_exp_avg_sq": {"1": 0.5},
    }


def growth(*observations: dict) -> dict:
    return {
        "from_layers": 1,
        "to_layers": 2,
        "operator": "stack",
        "observations": list(observations),
        "seconds_by_phase": {"build": 0.5, "copy": 0.25},
        "bytes_moved": 4_000_000,
        "eval_loss_before": 5.0,
        "eval_loss_after": 5.5,
        "eval_loss_later": None,
    }


def test_curves_are_the_observations() -> None:
    skipped_step, last = observation(1, 1.0), observation(10, 0.75, **{"0": 4.0, "1": 2.0})
    cosines, weights, gradients, seconds = build_figure([growth(skipped_step, last)]).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in cosines.lines}
    assert drawn == {"weights": [[1, 1.0], [10, 0.75]], "second moment": [[1, 0.5], [10, 0.5]]}
    assert [line.get_label() for line in weights.lines[:2]] == ["step 1", "step 10"]
    assert gradients.lines[0].get_xydata().tolist() == [[0, 4.0], [1, 2.0]]
    assert [bar.get_width() for bar in seconds.patches] == [0.5, 0.25]
    assert "later" not in seconds.get_title(loc="left")


def test_it_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    assert draw_growths(tmp_path, [growth()]) is None
    path = draw_growths(tmp_path, [growth(), growth(observation(1, 1.0))])
    assert path == tmp_path / "report" / "growths.png" and path.stat().st_size > 10_000
