"""A process without progress ends itself and says where it stood."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
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


def test_a_stopped_process_does_not_hang() -> None:
    """Ctrl-Z, or a suspended job, for longer than a hang may take."""
    code = "import time\nfrom ds_stacking.training.watchdog import Watchdog\ndog = Watchdog(2)\nprint(1, flush=True)\n"
    code += "for _ in range(20):\n    time.sleep(0.1)\n    dog.beat()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0


def test_it_ends_a_process_whose_words_nobody_takes() -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, b"x" * 4096)
    code = "import time\nfrom ds_stacking.training.watchdog import Watchdog\nWatchdog(0.5)\ntime.sleep(50)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=write)
    try:
        assert process.wait(30) == -signal.SIGABRT
    finally:
        process.kill()
        os.close(read), os.close(write)


def test_it_can_be_off_and_be_closed() -> None:
    assert watched("time.sleep(1)", 0).returncode == 0
    assert watched("dog.close()\ntime.sleep(2)", 0.5).returncode == 0


def test_it_comes_before_the_time_limit_of_collective_calls() -> None:
    assert collective_limit(1800) == timedelta(seconds=1860)
    assert collective_limit(0) == LONGEST, "never is no limit that torch knows"
