"""launchers/dashboard.py as a user calls it: one sentence for bad input, and nothing written."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launchers" / "dashboard.py"
PROJECT = ("--project", "p")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Nothing to do"),
        (("",), "is empty"),
        (("/absent",), "'/absent' is no folder"),
        (("--project", ""), "--project is ''"),
        (("--project", "a\nb"), r"--project is 'a\nb'"),
        (("--project", "x" * 10_000), "--project is 'xxx"),
        ((*PROJECT, "--entity", "a/b"), "--entity is 'a/b'"),
        ((*PROJECT, "--out", ""), "--out is ''"),
        ((*PROJECT, "--out", "none/w.json"), "lies in no folder"),
        ((*PROJECT, "--out", "."), "is a folder"),
        ((*PROJECT, "--out", "x" * 10_000), "File name too long"),
        (("run", "--out", "w.json"), "give its --project too"),
        ((*PROJECT, "--projekt", "q"), "Unknown option '--projekt'; did you mean --project?"),
        (("--out",), "--out expected one argument"),
        (("-x",), "Unknown option '-x'"),
    ],
)
def test_bad_input_is_one_sentence(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dashboard.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1 and len(error) < 400
    assert not any(tmp_path.iterdir())
