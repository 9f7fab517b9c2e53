"""What the launcher says of this process in its environment, checked before anything relies on it."""

from __future__ import annotations

import os

from ds_stacking.common.errors import UserError


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


def check_environment() -> None:
    """Raise UserError for what no launcher sets, and for a rank of a larger run that does not know its place."""
    if not rank() < world_size():
        raise UserError(f"RANK is {rank()} and WORLD_SIZE {world_size()}; ranks count from 0 to WORLD_SIZE - 1.")
    local_world_size()
    if world_size() > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError(
            f"WORLD_SIZE is {world_size()}, and LOCAL_RANK is not set: which GPU is this rank's? Start ranks with "
            f"deepspeed, torchrun or launchers/slurm/, or unset WORLD_SIZE."
        )
    local_rank()


def _number(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and int(text[:19]) >= least):
        raise UserError(
            f"The environment variable {name} is {text!r}; it must be a whole number from {least} up. Unset it, or "
            f"start with deepspeed, torchrun or launchers/slurm/."
        )
    return int(text)
