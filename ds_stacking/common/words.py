"""Words about what a user gave: a value cut short, and the known name that is nearest to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 60
"""Characters of a value that are shown."""


def shown(value: object) -> str:
    """A value as it stands in a message: on one line, without control characters, cut short."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def plain(text: str, longest: int = 500) -> str:
    """Text of a file for a terminal or a report: one line, without control characters, cut short."""
    words = "".join(character if character.isprintable() else " " for character in text[: longest + 1]).strip()
    return words if len(words) <= longest else f"{words[:longest]}..."


def nearest(unknown: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """The end of a sentence about an unknown name: the known one that was probably meant, else `otherwise` or all.

    Capitals, hyphens and underscores do not count; of a dotted name the last part may be given alone.
    """
    names = list(known)
    whole = {_bare(name): name for name in names}
    last = {_bare(name.rpartition(".")[2]): name for name in names}
    for bare, cutoff in ((whole, 0.6), (last, 0.8)):
        if near := difflib.get_close_matches(_bare(unknown), bare, n=1, cutoff=cutoff):
            return f"did you mean {bare[near[0]]}?"
    return otherwise or f"choose from {', '.join(names)}."


def _bare(name: str) -> str:
    return name.strip()[:LONGEST].lower().replace("-", "").replace("_", "")
