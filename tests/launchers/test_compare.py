"""launchers/compare.py as a user calls it: one sentence for bad input, and nothing written."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launchers" / "compare.py"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--arm=stack", "arm 'stack' is no NAME=LAYERS:STEPS"),
        ("--armss=stack", "did you mean --arms?"),
        ("--lrr=1", "did you mean --lr?"),
        ("--arms=scratch,pile", "pile"),
        ("--seeds=many", "--seeds"),
        ("--seeds=0", "--seeds is '0'; it must be a whole number from 1 to 1,000"),
        ("--budgets=small", "budgets 'small' is no list of numbers"),
        ("--clock=sun", "--clock is 'sun'; choose from wall, cpu"),
        ("--budgets=0.5,nan,2", "budgets holds nan"),
        ("--seeds=" + "9" * 5000, "--seeds is '999"),
        ("--task=-1", "--task is '-1'"),
        ("--task=25", "task 25 is not among the 25 of 5 arms (scratch, shallow_2, shallow_4, reset, stack)"),
        ("--minutes=0", "--minutes is '0'; it must be a positive number"),
        ("--tune=many", "--tune is 'many'"),
        ("--parallel=0", "--parallel is '0'"),
        ("--parallel=256", "parallel is 256, and there are"),
        ("--parallel=2 --launch=python", "--parallel 2 is for runs of one process each"),
        ("--clock=cpu --launch=python", "--clock cpu is for runs of one process each"),
        ("--study=nowhere.json", "study 'nowhere.json' cannot be read"),
        ("--study=nowhere.json --task=1", "--task is one arm and seed of one comparison"),
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
    monkeypatch.setattr(sys, "argv", ["compare.py", *option.split(" "), f"--output_dir={tmp_path / 'compare'}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is empty"),
        ("{}", "is damaged or no such file"),
        ('[{"name": "a"}]', "options: field required"),
        ('[{"name": "../a", "options": []}]', "name: string should match pattern"),
        ('[{"name": "a", "options": []}, {"name": "a", "options": []}]', "has two comparisons a"),
        ('[{"name": "a", "options": ["--output_dir=x"]}]', "a gives --output_dir, which is one for the whole study"),
        ('[{"name": "a", "options": ["--parallel=2"]}]', "a gives --parallel, which is one for the whole study"),
        ('[{"name": "a", "options": ["--arms=pile"]}]', "arm 'pile' is unknown"),
        ('[{"name": "a", "options": []}, {"name": "b", "options": ["--lr=x"]}]', "lr"),
    ],
)
def test_a_study_is_checked_whole_before_it_begins(
    content: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "study.json").write_text(content)
    options = [f"--study={tmp_path / 'study.json'}", f"--output_dir={tmp_path / 'compare'}"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "compare").exists()


def test_a_study_runs_its_comparisons_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for pretrain.py, twice: the second call starts nothing."""
    entries = [
        {"name": name, "options": ["--stages=1:20,2:30", "--seeds=2", *more]}
        for name, more in (("first", []), ("second", ["--arms=scratch,reset", "--tune"]))
    ]
    (tmp_path / "study.json").write_text(json.dumps(entries))
    fake = LAUNCHER.parents[1] / "tests" / "studies" / "comparison" / "fake_pretrain.py"
    options = [f"--study={tmp_path / 'study.json'}", f"--output_dir={tmp_path / 'all'}", "--data=docs", "--seeds=1"]
    launcher = tmp_path / "compare.py"
    launcher.write_text(LAUNCHER.read_text())
    (tmp_path / "pretrain.py").symlink_to(fake)
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(launcher), run_name="__main__")
    said = capsys.readouterr().out
    assert "comparison 1 of 2: first" in said and "comparison 2 of 2: second" in said
    lines = (tmp_path / "all/study.md").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["first", "second"] and said.rstrip().endswith(lines[-1])
    assert (tmp_path / "all/second/reset/lr0.002/seed-100001/summary.json").is_file()
    assert not (tmp_path / "all/first/scratch/x1/seed-2").exists(), "the command line's --seeds hold for each"
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(launcher), run_name="__main__")
    assert "run 1 of" not in capsys.readouterr().out


def test_a_comparison_whose_pilot_fails_leaves_the_others_of_its_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"name": name, "options": ["--stages=1:20,2:30", "--seeds=1", f"--lr={lr}"]}
        for name, lr in (("first", 0.5), ("second", 0.002))
    ]
    (tmp_path / "study.json").write_text(json.dumps(entries))
    launcher = tmp_path / "compare.py"
    launcher.write_text(LAUNCHER.read_text())
    (tmp_path / "pretrain.py").symlink_to(LAUNCHER.parents[1] / "tests/studies/comparison/fake_pretrain.py")
    monkeypatch.setenv("FAKE_DIVERGE", "0.1")
    options = [f"--study={tmp_path / 'study.json'}", f"--output_dir={tmp_path / 'all'}"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit, match="^1$"):
        runpy.run_path(str(launcher), run_name="__main__")
    said = capsys.readouterr()
    assert "error: first: the pilot ended with code 1" in said.err and said.out.count("report  ") == 1
    assert (tmp_path / "all/study.md").read_text().startswith("second: ")
