"""Names of files as paths, and as messages say them: one line, and printable whatever bytes a name has."""

from __future__ import annotations

from pathlib import Path

from ds_stacking.common.errors import UserError

_LONGEST = 300


def printable(text: str | Path) -> str:
    """A name as it can be printed and written as JSON; what cannot, such as half a surrogate pair, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
    return printable(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...")


def named_path(name: str) -> Path:
    """The path that an option names, `~` resolved. Raises UserError for a home that nobody has."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name!r} cannot be a path ({first_line(error)}); give another.") from None
