"""Two starts in one run directory under the real launcher: the second is refused, and the first never knows."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.corpus import small_options, write_corpus
from tests.training.test_resume import assert_equal_to_the_bit, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
START = 200
"""Seconds in which a run must have begun, on a busy machine too."""
STAGES = "--stages=1:100,2:400"


def launch(folder: Path, number: int, *more: str) -> psutil.Popen:
    options = [*small_options(folder), STAGES, "--eval_every=0", "--log_every=20", "--checkpoint_every=20", *more]
    command = ["deepspeed", "--num_gpus=2", f"--master_port={22000 + os.getpid() % 20000 + number}"]
    variables = {"LOCAL_SIZE": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / f"{number}.log").open("w") as log:
        return psutil.Popen(
            [*command, "launchers/pretrain.py", *options, "--tracking=none"],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for_step(run_dir: Path, step: int) -> None:
    end = time.monotonic() + START
    while not ((run_dir / "metrics.jsonl").exists() and metrics(run_dir) and metrics(run_dir)[-1]["step"] >= step):
        assert time.monotonic() < end
        time.sleep(0.1)


def contents(run_dir: Path) -> dict[Path, bytes]:
    """Every file of the run, hidden ones too."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def at_rest(folder: Path) -> dict[Path, bytes]:
    """The files of processes that were just stopped: a thread ends the system call that it is in, such as a save's."""
    files = contents(folder)
    while True:
        time.sleep(0.5)
        before, files = files, contents(folder)
        if files == before:
            return files


def test_a_second_start_is_refused_and_a_dead_owner_is_succeeded(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    run_dir = tmp_path / "run"
    first = launch(tmp_path, 1, "--resume=auto")
    wait_for_step(run_dir, 60)
    processes = [first, *first.children(recursive=True)]
    for process in processes:
        process.suspend()  # else a fast machine ends the run before the second start has come so far
    files = contents(run_dir)
    try:
        others = [launch(tmp_path, 2, "--resume=auto"), launch(tmp_path, 3, "--overwrite")]
        assert [other.wait(START) for other in others] == [2, 2]
        for number in (2, 3):
            said = (tmp_path / f"{number}.log").read_text()
            assert "is in use by process" in said and "choose another --output_dir" in said
        assert contents(run_dir) == files, "nothing was touched"
    finally:
        for process in processes:
            process.resume()
    cut = metrics(run_dir)[-1]["step"]
    wait_for_step(run_dir, cut + 40)

    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=20)
    assert launch(tmp_path, 4, "--resume=auto").wait(START) == 0, (tmp_path / "4.log").read_text()
    said = (tmp_path / "4.log").read_text()
    assert "resumed at step" in said and "looking for up to" not in said
    assert json.loads((run_dir / "summary.json").read_text())["finished"] is True

    assert launch(tmp_path, 5, f"--output_dir={tmp_path / 'whole'}").wait(START) == 0
    assert_equal_to_the_bit(tmp_path / "whole", run_dir)
