"""Runs end with the comparison that started them, also when it is killed; until then they are pinned and heard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_stacking.studies.comparison.starting import Slot, Starter

FAKE = Path(__file__).with_name("fake_pretrain.py")
PARENT = """
import sys
from pathlib import Path
from ds_stacking.studies.comparison.starting import Slot, Starter
folder, *launch = sys.argv[1:]
starter = Starter(folder=Path(folder), launch=launch, slots=[Slot()])
starter.start(Path(folder, "a/b/c"), ["--resume=auto", "--stages=[]"])
"""


def waited(condition: Callable[[], bool]) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def processes(folder: Path) -> list[str]:
    """Command lines of the processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [line] if str(folder) in (line := path.read_text()) else []
        except OSError:
            continue
    return found


@pytest.mark.parametrize("launch", [[], ["sh", "-c", '"$@"; true', "sh"]])
def test_a_killed_comparison_leaves_no_run(tmp_path: Path, launch: list[str]) -> None:
    """Be it the program itself or one below a launcher that does not hand signals on."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), *launch, sys.executable, str(FAKE)]
    parent = subprocess.Popen(command, env={**os.environ, "FAKE_WAIT": "a/b/c", "PYTHONPATH": str(FAKE.parents[3])})
    try:
        assert waited((tmp_path / "a/b/c/config.json").exists)
        assert len(processes(tmp_path)) >= 3, "the parent, the supervisor and the run"
    finally:
        parent.kill()
        parent.wait()
    is_gone = waited(lambda: not processes(tmp_path))
    (tmp_path / "a/b/c/stop").touch()
    assert is_gone


def starter(folder: Path, code: str, slot: Slot) -> Starter:
    return Starter(folder=folder, launch=[sys.executable, "-c", code], slots=[slot])


def test_a_run_has_its_cores_and_its_code_and_words_are_known(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    slot = Slot(cores={core}, environment={"MINE": "yes"})
    code = "import os, sys; print(os.sched_getaffinity(0), os.environ['MINE']); sys.exit(7)"
    assert starter(tmp_path, code, slot).start(tmp_path / "a/run", []) == (7, f"{{{core}}} yes")


def test_a_run_that_was_killed_has_the_code_of_a_shell(tmp_path: Path) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    assert starter(tmp_path, code, Slot()).start(tmp_path / "a/run", [])[0] == 137
