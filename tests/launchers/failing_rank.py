"""pretrain.py with a fault in the third optimizer step, given by FAULT as RANK:KIND:OTHERS. Started by tests.

KIND is raise, killed or bad_input. OTHERS is run: the ranks that have no fault go on; stuck: they wait as under NCCL,
in C code that never returns and lets no Python handler of a signal run; deaf: and no other thread runs either.
"""

import ctypes
import os
import signal
import sys
import time

from ds_stacking.command_line import parse_run, run_main
from ds_stacking.config import UserError


def fail(kind: str) -> None:
    print(f"the fault comes at {time.time()}", file=sys.stderr, flush=True)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("bad input on this rank alone") if kind == "bad_input" else RuntimeError("injected")


def wait_in_c(deaf: bool) -> None:
    mutex, libc = ctypes.create_string_buffer(64), (ctypes.PyDLL if deaf else ctypes.CDLL)(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # its owner never unlocks it, and signals do not interrupt it


def main() -> None:
    config = parse_run(sys.argv[1:])

    from ds_stacking.training.loop import Pretraining
    from ds_stacking.training.run import pretrain

    rank, kind, others = os.environ.get("FAULT", "1:raise:run").split(":")
    original = Pretraining.train_step

    def train_step(self: Pretraining, micro_batches: list) -> None:
        if self.position.step == 2:
            if self.rank == int(rank):
                fail(kind)
            if others != "run":
                wait_in_c(deaf=others == "deaf")
        original(self, micro_batches)

    Pretraining.train_step = train_step
    pretrain(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
