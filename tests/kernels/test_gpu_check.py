"""What the GPU check finds out: right and wrong kernels, its dry run on a CPU and on a bare CUDA host's packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def correctness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import correctness

    return correctness


def check(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OUT": str(out), **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_dry_run_walks_every_row(tmp_path: Path) -> None:
    done = check(tmp_path, "--dry", "--minutes", "9")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    records = {record["row"]: record for record in map(json.loads, (tmp_path / "gpu_check.jsonl").open())}
    listed = check(tmp_path, "--list").stdout.splitlines()
    assert {line.split("s  ", 1)[1] for line in listed} == set(records)
    assert not any("error" in record for record in records.values())
    assert records["compilation"]["compilations"] == 3 and records["compilation"]["failed"] == []
    assert records["sanitizer memcheck"]["ok"] and records["compiled"]["ok"]
    assert "liger" in records["speed: head N=768"]["absent"]


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_wrong_kernel_is_noticed(correctness: Any, fault: float) -> None:
    for factor, ok in ((1.0, True), (fault, False)):
        subject = correctness.Subject(
            inputs=[torch.randn(8, 8)], formula=lambda x: x * x, ours=lambda x, factor=factor: x * x * factor
        )
        assert correctness.compare(subject, torch.float32, True)["ok"] is ok


def test_a_kernel_that_does_not_repeat_itself_is_noticed(correctness: Any) -> None:
    noise = iter([1.0, 1.0, 1.0 + 2**-22])
    subject = correctness.Subject(
        inputs=[torch.randn(8, 8)], formula=lambda x: x * x, ours=lambda x: x * x * next(noise)
    )
    found = correctness.compare(subject, torch.float32, True)
    assert not found["ok"] and not found["repeats"]


def test_gradients_of_outputs_are_rounded_alike(correctness: Any) -> None:
    """In bf16 and in fp64 the same numbers come from behind: a linear operator's gradients are equal."""
    x = torch.randn(50, 50)
    fine, coarse = (
        correctness.evaluate(lambda x: x * 1.0, [x], dtype, torch.bfloat16)[1]
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert torch.equal(fine, coarse.double())


@pytest.mark.parametrize("name", ["attention documents p=0.1", "add_layer_norm N=768 pre-LN p=0.1"])
def test_another_dropout_mask_is_noticed(correctness: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas have to take the kernels' own mask: with the seed next to it they are far off."""
    from benchmarks.gpu_check import catalogue, subjects
    from ds_stacking.kernels.interpreter import interpreted

    at = catalogue.machine(dry=True)
    (make,) = (make for known, _, make in correctness.cases() if known == name)
    with interpreted(BLOCK_M=64, BLOCK_N=64, ROWS=64, STAGES=1):
        assert correctness.compare(make(at), at.dtype, True)["ok"]
        right = subjects.drop
        monkeypatch.setattr(subjects, "drop", lambda x, seed, *rest: right(x, seed + 1, *rest))
        assert not correctness.compare(make(at), at.dtype, True)["ok"]
