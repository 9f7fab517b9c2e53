"""What ends a launcher with words of its own: bad input, a stop that was asked for, another rank's failure."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. Its text is the one sentence that the user reads."""

    exit_code = 2


class RunAgain(Exception):
    """The run was asked to stop and has saved its state; the same command with `--resume auto` goes on."""

    exit_code = 75
    """sysexits.h's EX_TEMPFAIL, try again."""


class RunFailed(RuntimeError):
    """What went wrong while a run was under way and has a sentence of its own: no traceback would say more."""

    exit_code = 1


class OtherRankFailed(RunFailed):
    """Another rank failed in what all do together; its text has that rank's words where they are known."""


def require(condition: object, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)
