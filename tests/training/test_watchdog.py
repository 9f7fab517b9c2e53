"""A process without progress ends itself and says where it stood."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from ds_stacking.training.watchdog import LONGEST, collective_limit

ROOT = Path(__file__).parents[2]


def watched(body: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `body` in a process with a watchdog named `dog`."""
    code = f"import time\nfrom ds_stacking.training.watchdog import Watchdog\ndog = Watchdog({seconds})\n{body}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_hang_ends_with_every_thread_shown() -> None:
    done = watched("def stuck():\n    time.sleep(50)\nstuck()", 0.5)
    assert done.returncode == -6, "SIGABRT"
    assert "No progress for" in done.stderr and "in stuck" in done.stderr


def test_progress_keeps_it_alive() -> None:
    done = watched("for _ in range(30):\n    time.sleep(0.1)\n    dog.beat()\nprint('done')", 1)
    assert done.returncode == 0 and done.stdout == "done\n"


def test_it_can_be_off_and_be_closed() -> None:
    assert watched("time.sleep(1)", 0).returncode == 0
    assert watched("dog.close()\ntime.sleep(2)", 0.5).returncode == 0


def test_it_comes_before_the_time_limit_of_collective_calls() -> None:
    assert collective_limit(1800) == timedelta(seconds=1860)
    assert collective_limit(0) == LONGEST, "never is no limit that torch knows"
