"""Asked to stop: signals, a stop file, or a launcher that is gone. Every rank then saves the same step and ends.

Handlers only set a flag; the loop reduces it over ranks with the counts of a step and reads the sum a step later, so
that no step waits for it. The stop file is looked at by one rank of each node, once a second: a thousand ranks that
all ask shared storage at every step are a load of their own. The same signal for a second time ends the process at
once, unless it follows so soon that it is the same event: a launcher and a terminal both pass a Ctrl-C on, and SLURM
signals the processes of a job more than once, seconds apart.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.common.environment import local_rank
from ds_stacking.training.run_directory import stop_names

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_EVENT = {signal.SIGINT: 2.0, signal.SIGTERM: 15.0, signal.SIGUSR1: 15.0, signal.SIGHUP: 15.0}
"""Seconds after the first signal in which another one means the same."""
LOOK = 1.0
"""Seconds between two looks at the stop file and at the launcher."""


class StopRequest:
    """Whether this process was asked to stop, and why."""

    def __init__(self, run_dir: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        first_of_node = local_rank() == 0
        self.stop_files = [run_dir / name for name in stop_names()] if first_of_node else []
        self.reason: str | None = None
        self._signalled: dict[int, float] = {}
        self._next_look = 0.0
        self._launchers = _launchers()
        self._outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and len(self._launchers) == 1
        """Whether it was started under nohup by a shell, whose end it shall outlive."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Look for every kind of request; on this rank only."""
        now = self.now()
        if self.reason is None and now >= self._next_look:
            self._next_look = now + LOOK
            if found := next((path for path in self.stop_files if os.path.lexists(path)), None):
                self.reason = f"the stop file {found}"
            elif not self._outlives and _launchers() != self._launchers:
                self.reason = "the end of the launcher"
        return self.reason is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self._signalled.setdefault(number, self.now())
        if self.now() - first > SAME_EVENT[signal.Signals(number)]:
            os._exit(128 + number)
        if self.reason is None:
            self.reason = signal.Signals(number).name


class SharedStop:
    """Whether any rank was asked to stop, which all ranks come to know between the same two steps."""

    def __init__(self, request: StopRequest, device: torch.device) -> None:
        self.request, self.device = request, device
        self.told = False
        """Whether this rank knows that one was asked; the others know it too."""
        self._sum = LaterSum(device)

    def add_up(self, counts: Tensor) -> Tensor:
        """The `counts` of a step, [4] int64 on the host, over all ranks, on the device; the last is who was asked."""
        if self.request.asked():
            counts[-1] = 1
        total = counts.to(self.device, non_blocking=True)
        dist.all_reduce(total)
        self._sum.send(total[-1:])
        return total

    def ask(self) -> None:
        """Add up nothing but who was asked."""
        asked = torch.full((1,), int(self.request.asked()), dtype=torch.int64, device=self.device)
        dist.all_reduce(asked)
        self._sum.send(asked)

    def listen(self) -> None:
        """Read the sum that was sent last."""
        self.told = self.told or self._sum.read() > 0


class LaterSum:
    """A number on the device that the host reads one step later: only then is it surely there, and nobody waits."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._value = torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def send(self, value: Tensor) -> None:
        """Begin to copy `value`, [1] int64 on the device."""
        self._value.copy_(value, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> int:
        """What was sent last; 0 before that."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._value.numpy()[0])


def _launchers() -> tuple[int, ...]:
    """The parent and, where that is DeepSpeed's inner launcher, the front process that started it.

    Nobody tells the ranks when the front is killed: the inner launcher lives on without it.
    """
    parent = os.getppid()
    try:
        is_inner = b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes()
        status = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return (parent,)
    return (parent, int(status.rsplit(")", 1)[1].split()[1])) if is_inner else (parent,)
