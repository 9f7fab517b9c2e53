"""The figure of growths: its curves are the observations', and it is drawn without a growth that was looked at."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ds_stacking.reports.growth_figure import NORMS, draw_growths, growth_panels, observed_growths


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
    panels = growth_panels(growth(skipped_step, last))
    drawn = {title: Figure().subplots() for title in panels}
    for title, draw in panels.items():
        draw(drawn[title])
    cosines, weights, gradients, seconds = drawn.values()
    lines = {line.get_label(): line.get_xydata().tolist() for line in cosines.lines}
    assert lines == {"weights": [[1, 1.0], [10, 0.75]], "second moment": [[1, 0.5], [10, 0.5]]}
    assert [line.get_label() for line in weights.lines[:2]] == ["1 step after", "10 steps after"]
    assert gradients.lines[0].get_xydata().tolist() == [[0, 4.0], [1, 2.0]]
    assert [bar.get_width() for bar in seconds.patches] == [0.5, 0.25]


def test_what_was_not_measured_has_no_panel() -> None:
    look = {"weight_norm": {"0": None, "1": 3.0}, "gradient_norm": {}, "copy_cosine_master": {"1": None}}
    assert (
        list(growth_panels({"observations": [look], "seconds_by_phase": {"copy": None}})) == list(NORMS.values())[:1]
    )


def test_growths_are_found_in_a_runs_records() -> None:
    looks = [{"kind": "after_growth", "stage": stage, "steps_since": n} for stage, n in ((1, 1), (1, 2), (2, 1))]
    grown = {"kind": "growth", "stage": 1, "operator": "stack"}
    unseen = {"kind": "growth", "stage": 3}
    first, second = observed_growths([grown, *looks, unseen])
    assert first["operator"] == "stack" and first["observations"] == looks[:2]
    assert second == {"stage": 2, "observations": looks[2:]}


def test_it_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    assert draw_growths(tmp_path, [growth()]) is None
    path = draw_growths(tmp_path, [growth(), growth(observation(1, 1.0))])
    assert path == tmp_path / "report" / "growths.png" and path.stat().st_size > 10_000
