"""What the launcher says of this process in its environment, checked before anything relies on it."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from ds_stacking.common.errors import UserError

_VARIABLES = {
    "OMP_NUM_THREADS": (r"0*[1-9]\d{0,5}(,0*[1-9]\d{0,5})*", "a number of threads, such as 4"),
    "CUDA_VISIBLE_DEVICES": (
        r"(-?\d{1,4}|(GPU|MIG)-[\w/-]+)(,(-?\d{1,4}|(GPU|MIG)-[\w/-]+))*|NoDevFiles",
        "numbers or names of GPUs, such as 0,1",
    ),
    "DS_ACCELERATOR": (
        r"cuda|cpu|xpu|npu|mps|hpu|mlu|sdaa|supa|klxpu",
        "one that DeepSpeed knows, such as cuda or cpu",
    ),
    "MASTER_PORT": (r"0*([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])", "1 to 65535"),
}
"""Variables that libraries read, what they may hold where they are not empty, and that in words."""


def rank() -> int:
    """The number of this process among all of the run, from 0. Raises UserError."""
    return _number("RANK", default=0, least=0)


def world_size() -> int:
    """Processes of the run. Raises UserError."""
    return _number("WORLD_SIZE", default=1, least=1)


def local_rank() -> int:
    """The number of this process among those of its node, from 0: the GPU that it takes. Raises UserError."""
    return _number("LOCAL_RANK", default=0, least=0)


def local_world_size() -> int:
    """Processes of the run on this node; 1 where nobody says. Raises UserError."""
    return _number("LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE", default=1, least=1)


def restarts() -> int:
    """How often SLURM has started this job again. Raises UserError."""
    return _number("SLURM_RESTART_COUNT", default=0, least=0)


def cache_folder(chosen: str | None = None) -> Path:
    """Where prepared data and compiled code are kept: `chosen`, else $DS_STACKING_CACHE, else ~/.cache/ds_stacking.

    Raises UserError where nobody knows the user's home.
    """
    folder = Path(chosen or os.environ.get("DS_STACKING_CACHE") or "~/.cache/ds_stacking")
    try:
        return folder.expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"The cache folder {str(folder)!r} cannot be found ({error}); set corpus.cache_dir, $DS_STACKING_CACHE "
            f"or $HOME."
        ) from None


def check_environment() -> None:
    """Raise UserError for what no launcher sets, and for a rank of a larger run that does not know its place."""
    for name, (pattern, words) in _VARIABLES.items():
        value = os.environ.get(name)
        if value and not re.fullmatch(pattern, value):
            raise UserError(f"The environment variable {name} is {value[:80]!r}; it must be {words}, or not be set.")
    restarts()
    if world_size() > 1 and not os.environ.get("RANK"):
        raise UserError(
            f"WORLD_SIZE is {world_size()}, and RANK is not set: which of them is this process? Start ranks with "
            f"deepspeed, torchrun or launchers/slurm/, or unset WORLD_SIZE."
        )
    if not rank() < world_size():
        raise UserError(f"RANK is {rank()} and WORLD_SIZE {world_size()}; ranks count from 0 to WORLD_SIZE - 1.")
    local_world_size()
    if world_size() > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError(
            f"WORLD_SIZE is {world_size()}, and LOCAL_RANK is not set: which GPU is this rank's? Start ranks with "
            f"deepspeed, torchrun or launchers/slurm/, or unset WORLD_SIZE."
        )
    local_rank()


def check_meeting_place() -> None:
    """Raise UserError where the ranks of a run that a launcher started could not find rank 0, instead of waiting."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"RANK is set, and {name} is not: where do the ranks meet? Start ranks with deepspeed, torchrun or "
                f"launchers/slurm/, or unset RANK."
            )
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) != socket.EAI_AGAIN:  # else it may be known in a moment
            raise UserError(
                f"MASTER_ADDR is {address!r}, and this node knows no such host ({error}); give the name or address of "
                f"the node of rank 0."
            ) from None


def _number(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and int(text[:19]) >= least):
        raise UserError(
            f"The environment variable {name} is {text!r}; it must be a whole number from {least} up. Unset it, or "
            f"start with deepspeed, torchrun or launchers/slurm/."
        )
    return int(text)
