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
        ((), "required: --gpu"),
        (("--gpu", "h1000"), "did you mean h100"),
        (("--gpu", "h100", "--nodes", "many"), "--nodes"),
        (("--gpu", "h100", "--nodes", "-1"), "--nodes is '-1'; it must be a whole number from 1"),
        (("--gpu", "h100", "--mfu", "0"), "--mfu is '0'; it must be a number above 0"),
        (("--gpu", "h100", "--zero_stage", "4"), "--zero_stage"),
        (("--gpu", "h100", "--stages", "3x4"), "3x4"),
        (("--gpu", "h100", "--stages", "2:10,3:10"), "is not a multiple of 2"),
        (("--gpu", "h100", "--stages", "4:10,2:10"), "would shrink the model"),
        (("--gpu", "h100", "--operator", "stak"), "did you mean stack"),
        (("--gpu", "h100", "--trigger", "tokens:1"), "The trigger names 1 amounts"),
        (("--gpu", "h100", "--deepspeed_config", "none.json"), "none.json cannot be read"),
        (("--gpu", "h100", "--compile", "--zero_stage", "3"), "asks for compile with ZeRO stage 3"),
        (("--gpu", "h100", "--nodes", "0"), "--nodes is '0'"),
        (("--gpu", "h100", "--nodes", "1000000000"), "--nodes is '1000000000'"),
        (("--gpu", "h100", "--nodes", "٣"), "--nodes is '٣'"),
        (("--gpu", "h100", "--nodes", "100000", "--gpus_per_node", "1024"), "give 1,000,000 in all or less"),
        (("--gpu", "h100", "--gpus_per_node", "0"), "--gpus_per_node is '0'"),
        (("--gpu", "h100", "--mfu", "nan"), "--mfu is 'nan'"),
        (("--gpu", "h100", "--mfu", "2"), "--mfu is '2'"),
        (("--gpu", "x" * 10_000), "GPU 'xxx"),
        (("--gpu", "h100", "--tokens_per_step", "64000000000000"), "tokens_per_step is 64000000000000; it must be"),
        (("--gpu", "h100", "--stages", "2:99999999999999999999"), "steps is 99999999999999999999; it must be"),
        (
            ("--gpu", "h100", "--gpus_per_node", "1", "--model.hidden_size", "1000000000"),
            "model.hidden_size is 1000000000; it must be",
        ),
        (("--gpu", "h100", "--model.vocab_size", "8"), "is smaller than corpus.vocab_size"),
        (("--gpu", "h100", "--run", ""), "--run '' is no folder"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "l4", "--stages", "2:1000000,4:1000000"), "; stacking saves "),
        (("--gpu", "h100"), "; stacking saves nothing here: it takes "),
        (("--gpu", "h100", "--trigger", "prop:1"), "stage 1: 2 layers, 217 steps"),
    ],
)
def test_what_is_saved_and_when_it_grows_is_said_in_words(
    options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(monkeypatch, *options, "--gpus_per_node", "1") == 0
    text = capsys.readouterr().out
    assert words in text and "saves -" not in text
    plan(monkeypatch, "--gpu", "h100", "--gpus_per_node", "1", "--stages", "2:5")
    assert "saves" not in capsys.readouterr().out, "nothing grows"
