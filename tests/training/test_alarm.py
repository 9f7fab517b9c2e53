"""An error on one rank ends a run whose other ranks sit in C code: how soon, with which codes, and what is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_stacking.common.failures import LOST
from tests.corpus import small_options, write_corpus

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RANKS = 2
END = 200.0
"""Seconds after which a rank is taken for one that would hang; an alarm ends it within some ten."""


def run(folder: Path, fault: str) -> tuple[list[int], list[str], float, str]:
    """Exit codes and standard errors by rank, seconds from the fault to the end, and the file of failures.

    No launcher: as under `srun --kill-on-bad-exit=0`, nobody ends the other ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failures = folder / "failures"
    common = {"FAULT": fault, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "DS_STACKING_FAILURE_FILE": str(failures)}
    command = [sys.executable, "tests/launchers/failing_rank.py", *small_options(folder), "--tracking=none"]
    command += [f"--output_dir={folder}/{fault.replace(':', '-')}"]
    files = [open(folder / f"{rank}.err", "w+") for rank in range(RANKS)]  # noqa: SIM115 -- closed below
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=files[rank],
        )
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            process.wait(END)
        ended = time.time()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read())
        file.close()
    begun = re.search(r"the fault comes at ([\d.]+)", "".join(said))
    assert begun, said
    noted = failures.read_text() if failures.exists() else ""
    return [process.returncode for process in processes], said, ended - float(begun[1]), noted


MOVE = "rank 1 failed while moving the state: RuntimeError: injected; 1 ranks wait for it and cannot go on"
INJECTED, BAD = "RuntimeError: injected", "UserError: bad input on this rank alone"
CASES = [
    ("1:raise:stuck", [1, 1], f"rank 1 failed ({INJECTED})", f"rank 1: {INJECTED}\n"),
    ("0:raise:stuck", [1, 1], "", f"rank 0: {INJECTED}\n"),  # the one that would speak on this node
    ("1:bad_input:stuck", [1, 2], f"rank 1 failed ({BAD})", f"rank 1: {BAD}\n"),
    ("0:killed:stuck", [-signal.SIGKILL, LOST], "rank 0 is gone", ""),
    ("1:killed:run", [LOST, -signal.SIGKILL], "", ""),
    ("1:fabric:stuck", [LOST, LOST], "rank 1 failed (RuntimeError: NCCL error: injected)", ""),
    ("1:memory:run", [1, 1], "", "rank 1: MemoryError: none left\n"),
    ("1:move:stuck", [1, 1], f"rank 1 failed (CollectiveDeadlock: {MOVE})", f"rank 1: CollectiveDeadlock: {MOVE}\n"),
]
QUICK = ("1:raise:stuck", "0:killed:stuck", "1:fabric:stuck")


@pytest.mark.parametrize(
    ("fault", "codes", "sentence", "noted"),
    [pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_the_run_ends(tmp_path: Path, fault: str, codes: list[int], sentence: str, noted: str) -> None:
    write_corpus(tmp_path / "corpus")
    ended, said, seconds, failures = run(tmp_path, fault)
    print(f"{fault}: {seconds:.1f} s from the fault to the end of the last rank")
    assert ended == codes, said
    assert failures == noted, "only what would come again is noted"
    others = "".join(said[rank] for rank in range(RANKS) if rank != int(fault[0]))
    if "memory" in fault:
        why = "rank 1 failed while looking for the memory of the grown engine: MemoryError: none left"
        assert others.count(f"error: rank 0 ends: {why}") == 1 and "Traceback" not in others, others
    if fault.endswith("stuck"):
        assert "Traceback" not in others and (f"error: {sentence}; rank" in others or not sentence), others
