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


def nearest(unknown: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known one that was probably meant, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(unknown[:LONGEST], names, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}."
