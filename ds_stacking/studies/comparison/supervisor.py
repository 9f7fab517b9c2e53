"""Runs a command that shall not outlive the process which started this one, however that one ends.

python -I -S supervisor.py PARENT CORES COMMAND...

PARENT is that process, CORES are what the command is pinned to, such as 2,3, or nothing. A launcher's ranks are no
children of ours, so all of the session gets SIGTERM, at which a run saves and stops.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


def main() -> int:
    """Run the command; its exit code, 128 and the signal for one that was killed."""
    parent, cores, *command = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))  # threads and children of the command have it too
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, _end_all)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before that
        _end_all()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _end_all(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
