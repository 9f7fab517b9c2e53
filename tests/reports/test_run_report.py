"""The page of a run: what it holds, while the run goes on and afterwards, and how it looks on a phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.reports.run_report import write_report
from tests.reports.browser import look, needs_browser

SUMMARY: dict[str, Any] = {
    "finished": True, "steps": 40, "world_size": 2, "zero_stage": 3, "eval_loss_masked": 4.321,
    "parameters": 2_200_000, "tokens": 81920, "flops": 4e9, "seconds": 80.0, "unigram_entropy": 6.138,
    "eval_loss_shuffled": 6.7,
    "stages": [{"layers": 2, "steps": 20}, {"layers": 4, "steps": 20}],
    "growths": [{"stage": 1, "eval_loss_later": 5.005}],
}  # fmt: skip


def write_run(folder: Path, name: str = "mine") -> Path:
    """A run of two stages in full detail, without its summary."""
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for step in range(1, 41):
        stage = int(step > 20)
        at = {"step": step, "stage": stage, "layers": 2 + 2 * stage, "tokens": 2048 * step, "flops": 1e8 * step}
        at["seconds"] = 2.0 * step
        rates = {"tokens_per_second": 4000.0 - 2000 * stage, "flops_per_second": 3e10, "lr": 1e-3, "grad_norm": 1.0}
        if step == 21:
            grown = {
                "from_layers": 2,
                "to_layers": 4,
                "operator": "stack",
                "optimizer_state": "reset",
                "seconds_growth": 0.3,
            }
            losses = {"eval_loss_before": 5.123, "eval_loss_after": 5.456, "tensors_verified": 58}
            records.append({"kind": "growth", **at, **grown, **losses})
            blocks = {"weight_norm": {str(b): 20.0 + b for b in range(4)}, "copy_cosine_master": {"2": 1.0, "3": 0.9}}
            records.append({"kind": "after_growth", "steps_since": 1, "gradient_norm": {}, **at, **blocks})
        records.append({"kind": "train", "loss": 8.0 - step / 20, **at, **rates})
        if step % 10 == 0:
            records.append({"kind": "eval", "eval_loss": 8.1 - step / 20, "eval_loss_masked": 8.2 - step / 20, **at})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"name": name}))
    return folder


def test_a_finished_run_is_told_in_full(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run"), SUMMARY).read_text()
    for text in ("4.321", "40 steps on 2 ranks, ZeRO stage 3", "2.2 M", "2 → 4", "5.123", "5.456", "5.005", "4.0 k"):
        assert text in page, text
    assert page.count("<svg") == 3 + 2 + 4, "losses, blocks of the growth, rates; no gradient norm was measured"


def test_a_run_that_goes_on_is_told_as_far_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page = write_report(folder).read_text()
    assert "Not finished: step 40" in page and "Stages" not in page
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    assert "Finished: 40 steps" in write_report(folder).read_text()
    (folder / "metrics.jsonl").write_text("")
    (folder / "summary.json").unlink()
    assert "Nothing has been logged yet" in write_report(folder).read_text()
    with pytest.raises(UserError, match="is no folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match="no metrics.jsonl"):
        write_report(tmp_path)


def test_the_page_loads_nothing_and_trusts_no_name(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", name="<img src=x onerror=alert(1)>"), SUMMARY).read_text()
    assert "<img" not in page and "http" not in page and "<script" not in page
    assert "url(" not in page.replace("url(#", ""), "only clips of the page itself"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_it_reads_on_a_phone_dark_and_light(tmp_path: Path, dark: bool) -> None:
    path = write_report(write_run(tmp_path / "run"), SUMMARY)
    picture, width, text = look(path, width=390, dark=dark)
    assert width <= 390, "nothing hangs over the edge"
    assert "Blocks after a growth" in text and "2 → 4 layers" in text
    corner = picture[5, 3, :3].mean()
    assert corner < 0.15 if dark else corner > 0.95
    assert picture[..., :3].std() > 0.03
