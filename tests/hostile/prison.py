"""Runs a launcher in a forked process of its own: bounded in memory, time and file size, its words and its end noted.

The process is forked from one that has imported all that launchers import, so a case costs what the launcher does and
no more. It becomes the launcher: the same script, its options, environment and working directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import context

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
"""Seconds until a launcher counts as hanging; two cores are shared with other tests."""
MEMORY = 6 << 30
"""Bytes of data after which an allocation fails: above what is allowed, so that the excess is seen and not fatal."""
ALLOWED_MEMORY = 700 << 20
"""Bytes that a launcher may use beyond an idle process."""
LARGEST_FILE = 1 << 28


@dataclass(frozen=True)
class Outcome:
    """How a launcher ended."""

    command: str
    code: int | None
    """Exit code; minus the signal's number where one ended it; None where it had to be killed."""
    out: str
    err: str
    peak: int
    """Bytes of resident memory, at most, beyond those of an idle process; -1 where it could not say."""

    @property
    def sentences(self) -> list[str]:
        """The errors that it spoke of."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]

    def faults(self) -> list[str]:
        """What is wrong with the end itself, whatever the input was."""
        found = []
        if self.code not in (0, 1, 2):
            found.append("hangs" if self.code is None else f"ends with {self.code}")
        if "Traceback (most recent call last)" in self.out + self.err:
            found.append("prints a traceback")
        if "full traceback" in self.err:
            found.append("has no sentence of its own for this")
        if self.code in (1, 2) and len(self.sentences) != 1:
            found.append(f"says {len(self.sentences)} sentences")
        for sentence in self.sentences:
            if len(sentence) > 1500 or not re.search(r"[.?]$", sentence) or not sentence.isprintable():
                found.append("says what is no sentence")
        if self.peak > ALLOWED_MEMORY:
            found.append(f"uses {self.peak >> 20} MiB")
        return found

    def __str__(self) -> str:
        words = "\n".join([*self.out.splitlines()[-3:], *self.err.splitlines()[-12:]])
        return f"{self.command}: exit code {self.code}, {self.peak >> 20} MiB\n{words[-3000:]}"


def run(
    script: str,
    options: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    closed: Sequence[int] = (),
    without: Callable[[], None] | None = None,
) -> Outcome:
    """Run launchers/`script` in `folder`/work with nothing in its environment but `environment`.

    `closed` are descriptors that it finds closed (1 is standard output); `without` takes something out of the library
    before the launcher starts.
    """
    words = folder / "words"
    words.mkdir(exist_ok=True)
    process = context.Process(
        target=_prisoner, args=(script, list(options), str(folder), dict(environment), list(closed), without)
    )
    process.start()
    process.join(PATIENCE)
    hangs = process.is_alive()
    _end(process.pid)  # also what it left behind, such as wandb's own service
    process.join()
    out, err = ((words / name).read_text(errors="replace") for name in ("out", "err"))
    peak = int((words / "peak").read_text() or -1) if (words / "peak").exists() else -1
    (words / "peak").unlink(missing_ok=True)
    command = f"{script} {' '.join(map(_short, options))}"
    return Outcome(command, None if hangs else process.exitcode, out, err, peak)


def _short(option: str) -> str:
    return ascii(option)[1:-1] if len(option) < 200 else f"{ascii(option[:60])[1:-1]}...({len(option)} characters)"


def _end(pid: int | None) -> None:
    """Kill the session that a prisoner leads."""
    assert pid is not None
    for _ in range(20):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def _prisoner(
    script: str,
    options: list[str],
    folder: str,
    environment: dict[str, str],
    closed: list[int],
    without: Callable[[], None] | None,
) -> None:
    os.setsid()
    words = Path(folder) / "words"
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(words / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    for number in closed:
        os.close(number)
    os.umask(0o022)
    os.chdir(Path(folder) / "work")
    os.environ.clear()
    os.environ.update(environment)
    for limit, value in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, LARGEST_FILE)):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too large is then an error, as on a full disk
    tempfile.tempdir = None  # which was found in another environment
    idle, code = _peak(), 1
    sys.argv = [str(ROOT / "launchers" / script), *options]
    sys.path.insert(0, str(ROOT))
    try:
        if without is not None:
            without()
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        (words / "peak").write_text(str(_peak() - idle))
        os._exit(code)


def _peak() -> int:
    """Bytes of resident memory that this process has had, at most, and since it was forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError
