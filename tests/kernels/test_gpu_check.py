"""benchmarks/gpu_check: the whole of it in a dry run, and that it notices wrong kernels and missed targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import correctness, measure

    return correctness, measure


def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(report["correctness"]) >= 9 and all(item["ok"] for item in report["correctness"])
    rows = {row["case"] for row in report["rows"]}
    for operator in ("attention", "attention unpadded", "add_layer_norm", "linear_cross_entropy", "bias_gelu"):
        assert any(row.startswith(operator) for row in rows)
    assert report["left_out"] == []
    assert "vs liger: (must 1.5, goal 2.0) absent" in done.stdout and "WRONG" not in done.stdout


def test_out_of_time_is_named(check, monkeypatch, tmp_path):
    correctness, measure = check
    from benchmarks.gpu_check import __main__ as program

    monkeypatch.setattr(correctness, "subjects", lambda at: [])
    report = program.run(measure.machine(dry=True), 0.0, tmp_path)
    assert report["left_out"] == list(program.SECTIONS)
    assert "out of time before: attention 128, attention 512" in program.table(report)


def test_a_failing_section_does_not_cost_the_others(check, monkeypatch, tmp_path):
    correctness, measure = check
    from benchmarks.gpu_check import __main__ as program

    def broken(at):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(correctness, "subjects", lambda at: [])
    monkeypatch.setattr(program, "SECTIONS", {"broken": broken, "empty": lambda at: iter(())})
    report = program.run(measure.machine(dry=True), 1.0, tmp_path)
    assert report["rows"] == ["broken: FAILED RuntimeError: no such kernel"]


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_wrong_kernel_is_noticed(check, fault):
    correctness, measure = check
    x = torch.randn(8, 8)
    for factor, ok in ((1.0, True), (fault, False)):
        subject = correctness.Subject(
            name="square", inputs=[x], formula=lambda x: x * x, ours=lambda x, factor=factor: x * x * factor
        )
        assert correctness.compare(measure.machine(dry=True), subject)["ok"] is ok


def test_verdicts(check, monkeypatch):
    _, measure = check
    at, speed = measure.machine(dry=True), measure.Rates(copy=100.0, matmul=1.0)
    at.dry = False
    monkeypatch.setattr(measure.Machine, "medians", lambda self, runs: {"ours": 2.0, "slow": 5.0, "fast": 3.0})
    targets = [("slow", 2, 3), ("fast", 2, 3), ("best", 1, 1.4), ("copy", 0.4, 0.6), ("gone", 1, 2)]
    row = measure.Row(
        case="case", runs={}, bytes=100.0, targets=[measure.Target(peer=p, must=m, goal=g) for p, m, g in targets]
    )
    result = row.result(at, speed)
    assert [verdict["state"] for verdict in result["verdicts"]] == ["must", "MISSED", "goal", "must", "absent"]
    assert result["share_of_limit"] == 0.5
