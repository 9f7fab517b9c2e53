"""Curves: which records count, and that the picture holds every curve and every growth."""

import json
import sys

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ds_stacking.common.errors import UserError
from ds_stacking.reports.curves import draw_curves, draw_losses
from ds_stacking.reports.run_files import read_metrics


def write_run(run_dir, steps=(30, 30, 30), tail=""):
    """A run of three stages with 2, 4 and 8 layers; returns its records."""
    records, step, layers = [], 0, 2
    for stage, count in enumerate(steps):
        if stage:
            totals = {"tokens": step * 64, "flops": step * 1e9, "seconds": step * 0.5}
            growth = {"kind": "growth", "step": step, "stage": stage, "from_layers": layers, "to_layers": 2 * layers}
            records.append(growth | {"eval_loss_before": 6.0, "eval_loss_after": 6.57} | totals)
            layers *= 2
        for _ in range(count // 10):
            step += 10
            totals = {"tokens": step * 64, "flops": step * 1e9, "seconds": step * 0.5}
            records.append({"kind": "train", "step": step, "loss": 8 - step / 50} | totals)
            records.append(
                {"kind": "eval", "step": step, "eval_loss": 8.1 - step / 50, "eval_loss_masked": None} | totals
            )
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return records


def test_draws_a_picture_and_leaves_matplotlib_alone(tmp_path):
    write_run(tmp_path)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "report" / "curves.png"
    picture = imread(path)
    assert picture.shape[1] > 1500
    assert picture[..., :3].std() > 0.05
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("quantity", "end", "unit"),
    [("tokens", 5760, "tokens"), ("flops", 90, "model GFLOPs"), ("seconds", 45, "wall clock (seconds)")],
)
def test_every_panel_shows_the_curves_and_the_growths(tmp_path, quantity, end, unit):
    axes = Figure().subplots()
    draw_losses(axes, write_run(tmp_path), quantity)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["training"].get_xdata()[-1] == pytest.approx(end)
    assert list(lines["held-out"].get_ydata()).count(6.57) == 2
    assert "held-out, [MASK] positions only" not in lines  # it was never measured
    assert [text.get_text() for text in axes.texts] == ["2 → 4 layers", "4 → 8 layers"]
    assert [text.xy[0] / end for text in axes.texts] == pytest.approx([1 / 3, 2 / 3])
    assert axes.get_xlabel() == unit


def known(records):
    """The records without the fields that have no value."""
    return [{name: value for name, value in record.items() if value is not None} for record in records]


def test_after_a_resume_the_later_records_count(tmp_path):
    records = write_run(tmp_path)
    again = [record | {"seconds": 999.0} for record in records if record["step"] >= 50]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in again)
    assert read_metrics(tmp_path) == known([record for record in records if record["step"] < 50] + again)


def test_an_unfinished_last_line_is_passed_over(tmp_path):
    records = write_run(tmp_path, tail='{"kind": "tr')
    assert read_metrics(tmp_path) == known(records)


def test_errors_say_how_to_mend_them(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl"):
        draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(UserError, match="no evaluation yet"):
        draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('not json\n{"kind": "train", "step": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        draw_curves(tmp_path)
