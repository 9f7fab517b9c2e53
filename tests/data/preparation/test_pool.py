"""Workers end with their parent, at once, whatever they are doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from ds_stacking.data.preparation.pool import each

STUCK = """
import re, signal, sys
from ds_stacking.data.preparation import worker
from ds_stacking.data.preparation.pool import worker_pool

def stuck(_):
    open(sys.argv[1] if len(sys.argv) > 1 else "begun", "w").close()
    re.match("(a|aa)+$", "a" * 100 + "b")  # for ever, without a chance for another thread

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the tests may have been started to ignore
    with worker_pool(2, None) as pool:
        future = pool.submit(stuck, None)
        pool.submit(stuck, None)
        print("begun", flush=True)
        {}
"""


@pytest.mark.parametrize(
    ("signal_number", "then"),
    [(signal.SIGINT, "future.result()"), (signal.SIGTERM, "future.result()"), (signal.SIGKILL, "future.result()")],
)
def test_workers_in_a_long_call_end_with_their_parent(tmp_path: Path, signal_number: int, then: str):
    (tmp_path / "stuck.py").write_text(STUCK.replace("{}", then))
    process = subprocess.Popen(
        [sys.executable, "stuck.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    children: list[psutil.Process] = []
    try:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(signal_number)
        process.wait(timeout=60)
        assert not psutil.wait_procs(children, timeout=20)[1]
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def test_results_on_their_way_are_not_waited_for(tmp_path: Path):
    """Half of a large result is in the pipe when its worker is killed; leaving before any result is taken."""
    script = STUCK.replace("def stuck(_):", "def large(_):\n    return bytes(10**8)\n\ndef stuck(_):")
    (tmp_path / "large.py").write_text(script.replace("{}", "[pool.submit(large, None) for _ in range(4)]"))
    command = [sys.executable, "large.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)


def who(item: int) -> tuple[int, int]:
    return item, os.getpid()


def test_a_small_source_needs_no_worker_and_a_larger_one_gets_them():
    with closing(each(who, range(4), 0, alone=4)) as results:
        assert [result for _, result in results] == [(item, os.getpid()) for item in range(4)]
    with closing(each(who, range(9), 0, alone=2)) as results:
        found = list(results)
    assert [item for item, _ in found] == [result[0] for _, result in found] == list(range(9))
    assert [result[1] == os.getpid() for _, result in found] == [True] * 2 + [False] * 7
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
