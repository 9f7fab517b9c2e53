"""What a document is judged by: its cleaned text, the digest that finds it again, and whether it is held out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import blake2b

LONGEST_DOCUMENT = 2**22
"""Characters after which a text is cut at the next line end or blank, to bound the memory it needs."""

_CONTROL = {code: None for code in (*range(0x20), 0x7F)} | dict.fromkeys(b"\t\v\f", " ") | {ord("\n"): "\n"}
_INVISIBLE = re.compile(r"[\x80-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060\ufeff]+")
_BLANK = re.compile(r"[^\S\n ]")
_MOST_MARKS = 30
"""Accents and other marks on one character, as in Unicode's Stream-Safe Text Format: to put thousands into their
canonical order takes quadratic time."""
_SIGNS = re.compile(rf"[^\w\s\x00-\x7f]{{{_MOST_MARKS + 1},}}")


def clean_text(text: str) -> str:
    """Return a text in NFC without control and zero-width characters, single blanks and one empty line at most."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)
    if not text.isascii():
        text = _BLANK.sub(" ", _INVISIBLE.sub("", unicodedata.normalize("NFC", _SIGNS.sub(_limit_marks, text))))
    for longer, shorter in (("  ", " "), (" \n", "\n"), ("\n ", "\n"), ("\n\n\n", "\n\n")):
        while longer in text:
            text = text.replace(longer, shorter)
    return text.strip()


def _limit_marks(signs: re.Match[str]) -> str:
    """Leave out marks (Unicode category M) that are more than _MOST_MARKS in a row."""
    kept, marks = [], 0
    for sign in signs[0]:
        marks = marks + 1 if unicodedata.category(sign)[0] == "M" else 0
        if marks <= _MOST_MARKS:
            kept.append(sign)
    return "".join(kept)


def is_held_out(text: str, eval_percent: float) -> bool:
    """Whether a document is for evaluation: decided by its text alone, so a growing corpus never moves one."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_percent / 100 * 2**64


def digest(words: Sequence[str]) -> int:
    """Return 64 bits that are equal for documents of the same words."""
    return int.from_bytes(blake2b(" ".join(words).encode(), digest_size=8, person=b"same").digest(), "big")


def cut(text: str) -> Iterator[str]:
    """Yield a text, one longer than LONGEST_DOCUMENT in pieces that end at a line end or blank where there is one."""
    begin = 0
    while len(text) - begin > LONGEST_DOCUMENT:
        limit = begin + LONGEST_DOCUMENT
        half = begin + LONGEST_DOCUMENT // 2
        end = text.rfind("\n", half, limit) + 1 or text.rfind(" ", half, limit) + 1 or limit
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text
