"""One run directory, one writer: a second start is refused, whatever the storage; a dead owner's place is taken.

Who owns the directory writes into a file of `.owner/`, named by a number: the highest number owns. A start creates the
next number, which the file system lets only one of several do, so nobody needs file locks or renames what another may
have replaced. Numbers never fall while a directory lives, so an owner that slept finds that it was succeeded.

An owner is alive as long as its process is, where that can be looked up: on the same machine since the same boot. From
elsewhere it is alive as long as its heartbeat, a counter in its file, moves; clocks are not compared. A SLURM job that
was requeued succeeds itself at once, since SLURM ends the old processes first.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_stacking.checkpoint.share import from_first_rank
from ds_stacking.common.environment import restarts
from ds_stacking.common.errors import UserError
from ds_stacking.common.failures import note_failure
from ds_stacking.common.json_files import parse_json
from ds_stacking.common.own_files import make_inside, open_inside, read_inside
from ds_stacking.common.streams import last_words
from ds_stacking.config import RunConfig
from ds_stacking.engine.factory import device
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.training.run_directory import OWNERS, check_run_directory, make_run_directory

BEAT = 5.0
"""Seconds between two heartbeats."""
SILENCE = 60.0
"""Seconds without a heartbeat after which an owner on another machine is dead; storage may stall for some."""
RELEASED = "released"
NUMBER = re.compile(r"[1-9][0-9]{0,17}")
"""Names of owners' files."""
LARGEST = 1 << 16
"""Bytes of one."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process, told from every other one that ever ran."""

    host: str
    machine: str
    """Boot and process namespace, in which `pid` means the same."""
    pid: int
    started: str
    """Clock ticks from the boot to the start of the process: numbers of processes are used again."""
    job: str
    """The SLURM job, empty outside SLURM."""
    restart: int
    """How often SLURM has started that job again."""

    @classmethod
    def this(cls) -> Process:
        """The calling process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            started=_start_of(os.getpid()) or "",
            job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')}:{job}" if job else "",
            restart=restarts(),
        )

    def sees_alive(self, other: Process) -> bool | None:
        """Whether `other` lives, as far as this one can tell without waiting; None where it cannot."""
        if self.job and self.job == other.job and self.restart > other.restart:
            return False
        if self.machine == other.machine:
            return _start_of(other.pid) == other.started
        return None

    def __str__(self) -> str:
        job = f" of SLURM job {self.job.split(':')[-1]}" if self.job else ""
        return ascii(f"process {self.pid}{job} on {self.host}"[:200])[1:-1]  # it may be anybody's text


class Owner:
    """The ownership of a run directory. A thread keeps it alive and ends the process where it was lost."""

    def __init__(self, run_dir: Path, log: Callable[[str], None] = lambda text: None, *, shared: bool = False) -> None:
        """Take `run_dir`, which is made where it is not there. Raises UserError where another process owns it."""
        self.run_dir, self.folder = run_dir, run_dir / OWNERS
        self._made: list[Path] = []
        self._released = threading.Event()
        try:
            self._made = make_run_directory(run_dir, shared=shared)
            if not os.path.lexists(self.folder):
                self._made.insert(0, self.folder)
            make_inside(run_dir, OWNERS)
            self.number = self._claim(log)
        except OSError as error:
            self._unmake()
            raise UserError(
                f"output_dir {run_dir} cannot be written ({error.strerror}); choose another --output_dir."
            ) from error
        self._thread = threading.Thread(target=self._live, name="owner", daemon=True)
        self._thread.start()

    @property
    def holds(self) -> bool:
        """Whether the directory is still this process's."""
        return not self._released.is_set() and newest(self.folder) <= self.number and self._is_there()

    def _is_there(self) -> bool:
        """Whether the claim still stands where it was made: a directory may have been moved away, and made anew."""
        try:
            there, claim = os.stat(self.folder / str(self.number)), os.fstat(self._handle)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (claim.st_dev, claim.st_ino)

    def release(self) -> None:
        """Give the directory up; folders that were made for it and hold nothing but the claim go too."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # a dead process's claim is worth nothing either
            self._write(RELEASED)
        os.close(self._handle)
        with suppress(OSError):  # somebody else came, or deleted it
            if self.folder in self._made and os.listdir(self.run_dir) == [OWNERS]:
                (self.folder / str(self.number)).unlink()
        self._unmake()

    def _unmake(self) -> None:
        with suppress(OSError):  # the first one that holds something stays, and so do those around it
            for folder in self._made:
                folder.rmdir()

    def _claim(self, log: Callable[[str], None]) -> int:
        """Create the number after the newest one, whose owner must be gone."""
        me, number = Process.this(), 0
        while True:
            last = max(number, newest(self.folder))  # a listing may be out of date, a name that is taken is not
            if last and (owner := find_owner(self.folder / str(last), me, log)):
                raise UserError(
                    f"output_dir {self.run_dir} is in use by {owner}; wait for that run, stop it, or choose another "
                    f"--output_dir."
                )
            number = last + 1
            if not NUMBER.fullmatch(str(number)):
                raise UserError(f"{self.folder} counts further than any run; delete it where no run is under way.")
            try:
                self._handle = open_inside(self.run_dir, f"{OWNERS}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue  # another start was faster
            self._begin = json.dumps(asdict(me)).encode() + b"\n"
            self._write(f"{0:020d}")
            if newest(self.folder) <= number:
                break
            os.close(self._handle)  # what was seen was out of date: others have come and gone since
            (self.folder / str(number)).unlink()
        for path in self.folder.iterdir():
            if NUMBER.fullmatch(path.name) and int(path.name) < number:
                path.unlink(missing_ok=True)
        return number

    def _write(self, state: str) -> None:
        """Write this owner's file in place: were it replaced, a successor's claim could be undone."""
        os.pwrite(self._handle, self._begin + state.encode().ljust(20) + b"\n", 0)
        os.fsync(self._handle)

    def _live(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            with suppress(OSError):  # storage that fails for a while; the next beat tries again
                if newest(self.folder) > self.number or not self._is_there():
                    self._end()
                beat += 1
                self._write(f"{beat:020d}")

    def _end(self) -> None:
        """Nothing may be written any more, so the process ends here, whatever it is doing."""
        words = f"{self.run_dir} is no longer this run's (taken over, moved or deleted); this process ends"
        note_failure(0, words)  # the other ranks only see that this one is gone
        last_words(f"error: {words}.")
        os._exit(1)


def newest(folder: Path) -> int:
    """The highest number in a folder of owners; 0 where there is none."""
    with suppress(FileNotFoundError):
        return max((int(name) for name in os.listdir(folder) if NUMBER.fullmatch(name)), default=0)
    return 0


def find_owner(path: Path, me: Process, log: Callable[[str], None]) -> str | None:
    """Who owns the directory by the file `path`, in words; None where that one is dead or has given it up.

    Where only the heartbeat can tell, this waits until it moves or was still for `SILENCE` seconds.
    """
    first, end = _read(path), time.monotonic() + SILENCE
    content, said = first, False
    while content is not None:  # else a successor swept it away
        who, _, state = content.partition(b"\n")
        if state.strip() == RELEASED.encode():
            return None
        other = _parse(who)
        alive = me.sees_alive(other) if other else None
        if alive or content != first:
            return str(other or "another process")
        if alive is False or time.monotonic() > end:
            return None
        if not said:
            log(f"looking for up to {SILENCE:.0f} s whether {other or 'another process'} still lives")
            said = True
        time.sleep(BEAT / 10)
        content = _read(path)
    return None


def machine() -> str:
    """What two processes share exactly if they can look each other up: the boot and the namespace of processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # only the heartbeat tells


def _read(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        # opened again each time: a network file system asks its server only then
        return read_inside(path.parents[1], f"{OWNERS}/{path.name}", limit=LARGEST)
    return None


def _parse(who: bytes) -> Process | None:
    """None for half a file: its owner is just writing it, or died then."""
    try:
        return parse_json(who, Process, where=OWNERS, mend="")
    except UserError:
        return None


def _start_of(pid: int) -> str | None:
    """When a process started, field 22 of its stat (proc(5)); None for one that is gone, or a zombie."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[18] if state not in "ZX" else None
    return None


@contextmanager
def one_writer(config: RunConfig, log: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Own the run directory while the body runs, which gets a function that tells whether it still does.

    All ranks call it together; rank 0 owns for all. Raises UserError on every rank where another run has it.
    """
    owner: Owner | None = None

    def claim() -> None:
        nonlocal owner
        owner = Owner(Path(config.run_dir), log, shared=config.shared)
        try:
            check_run_directory(config)  # again: since the first look another run may have come and gone
        except UserError:
            owner.release()
            raise

    from_first_rank(claim, make_exchange(device()))
    try:
        yield lambda: owner is None or owner.holds
    finally:
        if owner is not None:
            owner.release()
