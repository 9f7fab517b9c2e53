"""The report of the GPU check: verdicts from made-up figures, and what counts as wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import report

    return report


def test_ratios_and_limits(report: Any) -> None:
    from benchmarks.gpu_check.targets import Target

    times = {"ours": [1.0, 2.0, 3.0], "slow": [5.0, 5.0, 5.0], "fast": [3.0, 3.0, 3.0]}
    row = {"modes": {"both": {"times": times}}, "bytes": {"both": 100.0}, "flops": {"both": 30.0}}
    rates = {"copy": 100.0, "matmul": 60.0}
    found = [
        report.ratio(Target("both", peer, 0, 0), row, rates) for peer in ("slow", "fast", "best", "limit", "gone")
    ]
    assert found == [2.5, 1.5, 1.5, 0.5, None]
    assert report.limit(row, "both", {**rates, "matmul": 10.0}) == 3.0  # the slower of the two
    assert report.limit(row, "both", {}) is None
    assert [report.verdict(v, 1.0, 2.0) for v in (0.9, 1.0, 2.0, None)] == ["MISSED", "must", "goal", "absent"]


def test_targets_say_which_peer_was_best_and_which_are_absent(report: Any) -> None:
    times = {"ours": [1.0] * 3, "FLASH": [2.0] * 3, "EFFICIENT": [1.5] * 3}
    measured = {mode: {"times": times} for mode in ("forward", "backward", "both")}
    row = {"modes": measured, "bytes": {}, "flops": {}, "absent": {"CUDNN": "no"}, "peak_bytes": {"ours": 3e8}}
    shown = report.table({f"speed: attention S={n}": {"row": str(n), **row} for n in (128, 512)}, [])
    assert "[best: EFFICIENT 1.50/1.3 must]" in shown and "[FLASH 2.00/1.15 goal]" in shown
    assert shown.count("[CUDNN absent]") == shown.count("[flex absent]") == 2
    assert " peak MB  ours 300" in shown
    alone = {mode: {"times": {"ours": [1.0] * 3}} for mode in measured}
    assert "[best absent]" in report.table({"speed: attention S=128": {"row": "x", **row, "modes": alone}}, [])


def test_what_a_peer_computes_is_told_beside_its_row(report: Any) -> None:
    from benchmarks.gpu_check import model

    records = {f"model: {n}": {"row": n, "contenders": {}} for n in ("a", "b")}
    records["model: b"]["note"] = model.PADDED
    lines = list(report.model_lines(records))
    assert lines == ["a", f"b ({model.PADDED})"] and "the peer computes padded rows" in model.PADDED


def test_model_goals(report: Any) -> None:
    from benchmarks.gpu_check.targets import RATIOS, Goal

    found = {
        "ours": {"seconds": 2.0, "tokens_per_second": 600, "bytes": 80},
        "ours compiled": {"seconds": 1.0, "tokens_per_second": 1200, "bytes": 50},
        "peer": {"seconds": 2.0, "tokens_per_second": 600, "bytes": 100},
        "peer compiled": {"seconds": 1.5, "tokens_per_second": 800, "bytes": 90},
    }
    goals = [Goal("tokens/s", 500, 700), *RATIOS]
    assert [report.goal_value(goal, found) for goal in goals] == [1200, 2.0, 1.5, 0.5]  # the better of ours
    bare = {name.replace("peer", "peer bare").replace("ours", "bare"): entry for name, entry in found.items()}
    assert [report.goal_value(goal, bare) for goal in goals] == [1200, 2.0, 1.5, 0.5]
    engine = Goal("bare", 0.95, 0.95)
    assert report.goal_value(engine, bare) is None and report.goal_value(engine, {**found, **bare}) == 2.0
    found["peer compiled"] = {"absent": "OutOfMemoryError"}
    assert report.goal_value(goals[2], found) is None
    assert report.goal_value(goals[0], {"ours": {"absent": "x"}}) is None


def test_what_is_wrong_and_what_failed(report: Any) -> None:
    growth = {"from": 3, "to": 6, "seconds": 0.1, "total": 1.0, "peak_bytes": 10, "exact": False}
    records = {
        "correct: a": {"row": "correct: a", "ok": True, "repeats": True, "errors": [0.1], "peer": [0.2]},
        "correct: b": {"row": "correct: b", "ok": False, "repeats": False, "errors": [0.3], "peer": [0.2]},
        "resume": {"row": "resume", "same_bits": False, "steps": 8},
        "growth": {"row": "growth", "growths": [growth]},
        "rates": {"row": "rates", "error": "RuntimeError: no"},
        "model: x": {"row": "model: x", "skipped": "deepspeed absent"},
    }
    assert report.wrong(records) == ["correct: b", "resume", "growth"]
    text = report.table(records, ["model: y"])
    for words in (
        "correct: 1 of 2", "WRONG correct: b: errors ours/torch 3.0e-01/2.0e-01, and two runs differ", "exact: False",
        "ERROR rates : RuntimeError: no", "skipped model: x: deepspeed absent", "no time for 1 rows: model: y",
    ):  # fmt: skip
        assert words in text, text


def test_a_whole_session_fits_into_a_reply(report: Any) -> None:
    from benchmarks.gpu_check import catalogue, model
    from benchmarks.gpu_check.targets import GOALS, TARGETS

    timed = {row.name for row in catalogue.rows() if row.name.startswith("speed: ")}
    assert {f"speed: {name}" for name in TARGETS} <= timed and set(GOALS) <= set(model.CHECKS)
    peers = ("ours", "FLASH", "CUDNN", "EFFICIENT", "flex")
    times = {"times": {who: [1.234e-3] * 3 for who in peers}}
    row = {"modes": dict.fromkeys(("forward", "backward", "both"), times), "absent": {"liger": ""}}
    work = {"bytes": dict.fromkeys(row["modes"], 1e9), "flops": dict.fromkeys(row["modes"], 1e12)}
    records: dict[str, Any] = {"rates": {"row": "rates", "rates": {f"matmul 32768 x {n}": 8e14 for n in range(11)}}}
    records |= {name: {"row": name, **row, **work} for name in timed}
    figures = {"seconds": 0.3, "tokens_per_second": 912_345, "bytes": 12e9, "mfu": 0.412}
    contenders = {"row": "model", "contenders": dict.fromkeys(model.ENGINE, figures)}
    records |= {f"model: {name}": contenders for name in model.CHECKS}
    text = report.table(records, [])
    assert "[FLASH 1.00/1.15 MISSED]" in text and "[tokens/s 912345/900000 must]" in text
    assert len(text) < 12_000
    dry = report.table({**records, "environment": {"row": "environment", "device": "CPU, dry run"}}, [])
    assert "MISSED" not in dry and "must]" not in dry and "FLASH" in dry
