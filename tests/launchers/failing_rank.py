"""pretrain.py with a fault, given by FAULT as RANK:KIND:OTHERS. Started by tests.

KIND is raise, fabric, killed or bad_input, in the third optimizer step; memory (none is left) or move (an error amid
the moves), in the first growth. OTHERS is run: the ranks that have no fault go on; stuck: they wait as under NCCL, in
C code that never returns and lets no Python handler of a signal run; deaf: and no other thread runs either.
"""

import ctypes
import itertools
import os
import signal
import sys
import time
from typing import Any

from ds_stacking.command_line import parse_run, run_main
from ds_stacking.common.errors import UserError


def fail(kind: str) -> None:
    print(f"the fault comes at {time.time()}", file=sys.stderr, flush=True)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "bad_input":
        raise UserError("bad input on this rank alone")
    if kind == "memory":
        raise MemoryError("none left")
    raise RuntimeError("NCCL error: injected" if kind == "fabric" else "injected")


def wait_in_c(deaf: bool) -> None:
    mutex, libc = ctypes.create_string_buffer(64), (ctypes.PyDLL if deaf else ctypes.CDLL)(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # its owner never unlocks it, and signals do not interrupt it


def main() -> None:
    config = parse_run(sys.argv[1:])

    from ds_stacking.engine import handover
    from ds_stacking.engine.factory import EngineFactory
    from ds_stacking.training.loop import Pretraining
    from ds_stacking.training.run import pretrain

    rank, kind, others = os.environ.get("FAULT", "1:raise:run").split(":")
    growth = {"memory": (EngineFactory, "try_memory"), "move": (handover, "execute")}
    owner, name = growth.get(kind, (Pretraining, "train_step"))
    original, steps = getattr(owner, name), itertools.count(1)

    def faulty(*args: Any, **options: Any) -> Any:
        if kind in growth or next(steps) == 3:
            if os.environ["RANK"] == rank:
                fail(kind)
            if others != "run":
                wait_in_c(deaf=others == "deaf")
        return original(*args, **options)

    setattr(owner, name, faulty)
    pretrain(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
