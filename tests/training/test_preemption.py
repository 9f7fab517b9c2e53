"""Signals: the first one is a request, its echo is nothing, a later one ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import os, signal, sys, time
from pathlib import Path
from ds_stacking.training import preemption
number, later = int(sys.argv[1]), float(sys.argv[2])
stop = preemption.StopRequest(Path(sys.argv[3]))
assert not stop.asked()
os.kill(os.getpid(), number)
assert stop.asked()
stop._first -= later
os.kill(os.getpid(), number)
print(stop.reason)
"""


@pytest.mark.parametrize(
    ("number", "later", "code"),
    [
        (signal.SIGINT, 1, 0),
        (signal.SIGINT, 3, 130),
        (signal.SIGTERM, 10, 0),
        (signal.SIGTERM, 20, 143),
        (signal.SIGUSR1, 20, 138),
    ],
)
def test_a_second_signal(tmp_path: Path, number: signal.Signals, later: float, code: int) -> None:
    """The second one comes `later` seconds after the first."""
    command = [sys.executable, "-c", CODE, str(int(number)), str(later), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == ("" if code else number.name)
