"""Kills at random times: a run on two ranks is killed again and again, resumed, and compared with one left alone.

python tests/soak.py --kills 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from ds_stacking.checkpoint.select import newest_valid
from tests.corpus import write_corpus
from tests.training.faults import Ranks
from tests.training.test_resume import assert_equal_to_the_bit

OPTIONS = ("--stages=1:40,2:40,4:40", "--eval_every=10", "--checkpoint_every=5", "--hang_timeout=12")
FAULTS = {
    "SIGKILL of rank 0": ([0], signal.SIGKILL),
    "SIGKILL of rank 1": ([1], signal.SIGKILL),
    "SIGKILL of both": ([0, 1], signal.SIGKILL),
    "SIGTERM to rank 1": ([1], signal.SIGTERM),
}


def main() -> None:
    """Kill as often as asked, then print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chooser = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        assert set(Ranks(name, "whole", OPTIONS).wait()) == {"finished"}
        struck: Counter[str] = Counter()
        lost, runs = [], 0
        while struck.total() < asked.kills:
            runs += 1
            lost += kill_until_finished(name, f"run-{runs}", chooser, struck, asked.kills)
            assert_equal_to_the_bit(folder / "whole", folder / f"run-{runs}")
            print(f"{struck.total()} of {asked.kills} faults, {runs} runs finished and equal", flush=True)
    print("\n| fault | times |\n| --- | --- |")
    print("\n".join(f"| {fault} | {struck[fault]} |" for fault in FAULTS))
    print(f"| **all** | {struck.total()} |\n\nsteps lost at most: {max(lost)} (checkpoints every 5 steps)")
    print(f"runs: {runs}, all ended with weights, moments and metrics equal to the bit")


def kill_until_finished(
    folder: str, output: str, chooser: random.Random, struck: Counter[str], kills: int
) -> list[int]:
    """Steps lost by each fault until the run finished."""
    run, lost = Path(folder) / output, []
    while True:
        ranks = Ranks(folder, output, OPTIONS)
        fault = chooser.choice(list(FAULTS))
        if struck.total() < kills and wait_for_training(ranks, chooser.uniform(0, 1.5), run):
            targets, number = FAULTS[fault]
            for rank in targets:
                os.kill(ranks.processes[rank].pid, number)
            struck[fault] += 1
        ended = ranks.wait(after_a_death=40)
        if set(ended) == {"finished"}:
            return lost
        found = newest_valid(run / "checkpoints")
        lost.append(last_step(run) - (found.step if found else 0))


def wait_for_training(ranks: Ranks, seconds: float, run: Path) -> bool:
    """Wait for progress and then `seconds` longer; whether both ranks live."""
    path = run / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while all(process.is_alive() for process in ranks.processes):
        if path.exists() and path.stat().st_mtime_ns > before:
            time.sleep(seconds)
            break
        time.sleep(0.01)
    return all(process.is_alive() for process in ranks.processes)


def last_step(run: Path) -> int:
    """The last whole line's step in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


if __name__ == "__main__":
    main()
