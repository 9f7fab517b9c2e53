"""launchers/compare.py as a user calls it: one sentence for bad input, and nothing written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launchers" / "compare.py"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--arm=stack", "Unknown option or recipe key 'arm'; did you mean 'arms'?"),
        ("--lrr=1", "did you mean 'lr'?"),
        ("--arms=scratch,pile", "pile"),
        ("--seeds=many", "--seeds"),
        ("--seeds=0", "--seeds is '0'; it must be a whole number from 1 to 1,000"),
        ("--budgets=small", "budgets 'small' is no list of numbers"),
        ("--clock=sun", "--clock is 'sun'; choose from wall, cpu"),
        ("--budgets=0.5,nan,2", "budgets holds nan"),
        ("--seeds=" + "9" * 5000, "--seeds is '999"),
        ("--task=-1", "--task is '-1'"),
        ("--task=9", "task 9 is not among the 9"),
        ("--launch=", "launch is ''"),
        ("--launch='a", "No closing quotation"),
        ("--launch=nosuchprogram", "launch names 'nosuchprogram'"),
        ("--operator=stak", "operator 'stak' is unknown"),
        ("--resume=auto", "goes on by itself"),
        ("--report_only", "holds no comparison"),
    ],
)
def test_bad_input_is_one_sentence(
    option: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", option, f"--output_dir={tmp_path / 'compare'}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "compare").exists()
