"""A run with --precision fp8: refused where the hardware has none, else cut, resumed and grown as in bf16.

A CPU multiplies fp8 slowly, so the runs here say that their device does, and that their small model pays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_stacking.config
from ds_stacking.models import fp8
from ds_stacking.training import precision
from tests.corpus import small_options, write_corpus
from tests.engine.tiny import replaced
from tests.ranks import run_ranks
from tests.training.test_resume import assert_equal_to_the_bit, metrics, run

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    write_corpus(folder / "corpus")
    return folder


def run_in(folder: str, output: str, zero: int, cuts: tuple[int, ...], asked: str) -> list[torch.dtype]:
    """Train; the types of the left factors of all products in 8 bits."""
    seen: list[torch.dtype] = []
    original = fp8.multiply

    def multiply(a: torch.Tensor, *more: Any, **how: Any) -> torch.Tensor:
        seen.append(a.dtype)
        return original(a, *more, **how)

    with (
        replaced(ds_stacking.config, "SMALLEST_FP8", 16),
        replaced(precision, "multiplies_fp8", lambda device: True),
        replaced(fp8, "multiply", multiply),
    ):
        run(folder, output, zero, cuts, (f"--precision={asked}", "--stages=1:8,2:8"))
    return seen


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if line["kind"] == "train"]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_cut_run_ends_as_the_whole_one_and_near_bf16(zero: int, folder: Path) -> None:
    whole, cut, sixteen = (folder / f"{name}-{zero}" for name in ("whole", "cut", "sixteen"))
    seen = run_ranks(2, run_in, str(folder), whole.name, zero, (), "fp8")[0]
    assert set(seen) == {torch.float8_e4m3fn, torch.float8_e5m2}
    run_ranks(2, run_in, str(folder), cut.name, zero, (3, 8), "fp8")
    assert_equal_to_the_bit(whole, cut)
    assert not run_ranks(2, run_in, str(folder), sixteen.name, zero, (), "bf16")[0]
    assert json.loads((whole / "summary.json").read_text())["precision"] == "fp8"
    assert json.loads((sixteen / "summary.json").read_text())["precision"] == "bf16"
    ours, theirs = losses(whole), losses(sixteen)
    assert ours != theirs and ours == pytest.approx(theirs, abs=0.1)


def test_without_such_a_gpu_it_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    options = [*small_options(tmp_path), "--precision=fp8", "--model.hidden_size=1024", "--model.num_heads=16"]
    command = [sys.executable, "launchers/pretrain.py", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr
    assert "precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more" in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}
