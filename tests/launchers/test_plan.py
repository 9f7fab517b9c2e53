"""launchers/plan.py as a user calls it: a table, and one sentence for bad input."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launchers" / "plan.py"


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the launcher."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_recipe_on_1024_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "bert_large_stacking", "--nodes", "128", "--gpu", "h100", "--tokens_per_step", "4194304")
    assert plan(monkeypatch, *options) == 0
    text = capsys.readouterr().out
    assert "128 x 8 GPUs" in text and text.count("memory ZeRO-") == 12 and "stacking saves" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "GPU '' is unknown; choose from b200, h200"),
        (("--gpu", "h1000"), "did you mean h100"),
        (("--gpu", "h100", "--nodes", "many"), "--nodes"),
        (("--gpu", "h100", "--nodes", "-1"), "--nodes is '-1'; it must be a whole number from 1"),
        (("--gpu", "h100", "--mfu", "0"), "--mfu is '0'; it must be a number above 0"),
        (("--gpu", "h100", "--zero_stage", "4"), "--zero_stage"),
        (("--gpu", "h100", "--stages", "3x4"), "3x4"),
        (("--gpu", "h100", "--nodez", "2"), "nodez"),
        (("--gpu", "h100", "--recipe", "bert_bas"), "bert_bas"),
        (("--gpu", "h100", "--nodes", "7"), "which 56 ranks cannot share equally"),
        (("--gpu", "h100", "--gpus_per_node", "1", "--run", "/absent"), "--run '/absent' is no folder"),
    ],
)
def test_bad_input_is_one_sentence(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.strip().splitlines()) == 1
