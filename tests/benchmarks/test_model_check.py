"""The GPU check of whole training steps: all its cases in a dry run, and verdicts from made-up figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import model

    return model


def dry_run(folder: str) -> list[str]:
    from benchmarks.gpu_check import model

    return model.run(Path(folder), dry=True, minutes=5)


@pytest.mark.slow
@pytest.mark.distributed
def test_dry_run(tmp_path: Path) -> None:
    lines = run_ranks(1, dry_run, str(tmp_path))[0]
    report = json.loads((tmp_path / "gpu_check_model.json").read_text())
    assert len(report) == 10
    timed = [entry for found in report.values() for entry in found.values()]
    assert all(entry["tokens_per_second"] > 0 for entry in timed), timed
    assert sum("tokens/s: " in line for line in lines) == 4 and not any("out of time" in line for line in lines)


def test_verdicts(model_check: Any) -> None:
    check = model_check.Check(
        name="x", size="base", layers=12, length=128,
        goals=[model_check.Goal(against="tokens/s", floor=500, must=700), *model_check.RATIOS],
    )  # fmt: skip
    found = {
        "ours": {"seconds": 2.0, "tokens_per_second": 600, "bytes": 80},
        "ours compiled": {"seconds": 1.0, "tokens_per_second": 1200, "bytes": 50},
        "peer": {"seconds": 2.0, "tokens_per_second": 600, "bytes": 100},
        "peer compiled": {"seconds": 1.1, "tokens_per_second": 1100, "bytes": 90},
    }
    states = [line.split()[-1] for line in model_check.verdicts(check, found)]
    assert states == ["must", "floor", "MISSED", "floor"]  # the better of ours is judged
    found["peer compiled"] = {"absent": "OutOfMemoryError"}
    assert model_check.verdicts(check, found)[2].endswith("absent")
    assert model_check.verdicts(check, {"ours": {"absent": "x"}}) == ["    ours did not run"]


def test_no_gpu_is_said(model_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if not torch.cuda.is_available():
        assert model_check.main([]) == 2
        assert "use --dry" in capsys.readouterr().out
