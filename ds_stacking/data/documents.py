"""What a document is judged by: its cleaned text, the digest that finds it again, and whether it is held out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b

LONGEST_DOCUMENT = 2**22
"""Characters after which a text is cut at the next line end or blank, to bound the memory it needs."""

_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060\ufeff]+")
_BLANK = re.compile(r"[^\S\n ]")
_LINE_END = re.compile(r" *\n *")


def clean_text(text: str) -> str:
    """Return a text in NFC without control and zero-width characters, single blanks and one empty line at most."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = _INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _BLANK.sub(" ", text)
    if "  " in text:
        text = re.sub(" {2,}", " ", text)
    if " \n" in text or "\n " in text:
        text = _LINE_END.sub("\n", text)
    if "\n\n\n" in text:
        text = re.sub("\n{3,}", "\n\n", text)
    return text.strip()


def is_held_out(text: str, eval_percent: float) -> bool:
    """Whether a document is for evaluation: decided by its text alone, so a growing corpus never moves one."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_percent / 100 * 2**64


def digest(text: str) -> int:
    """Return 64 bits that are equal for texts with the same words, whatever their case and line breaks."""
    words = " ".join(text.casefold().split())
    return int.from_bytes(blake2b(words.encode(), digest_size=8, person=b"same").digest(), "big")


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
