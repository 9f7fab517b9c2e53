"""One document: its cleaned text, the digest that finds it again, whether it is held out, its sentences.

All of it goes by rules, with no model and no download: the same on every machine.
"""

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

_ABBREVIATIONS = (
    "mr mrs ms dr prof st sr jr messrs mme mlle rev hon gen col capt lt sgt gov sen rep pres "
    "jan feb mar apr jun jul aug sep sept oct nov dec no nos vol vols p pp fig figs ed eds vs cf ca c etc viz "
    "e.g i.e u.s u.k a.m p.m b.c a.d inc ltd co corp dept univ est approx"
)
_ABBREVIATION = re.compile(rf"(?:^|[\s(\"'“‘])(?:{'|'.join(map(re.escape, _ABBREVIATIONS.split()))}|[A-Z])\.$", re.I)
_BOUNDARY = re.compile(r"[.!?…。！？][\"'”’»)\]]*(\s+)(?=[\"'“‘«(\[]*[A-Z0-9\u00c0-\uffff])|(\s*\n\s*)|\s\s+")
"""The last, blanks without a line break, is no boundary; matched at once, they are read once."""
_LONGEST_ABBREVIATION = 12


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


def cut(text: str, longest: int = LONGEST_DOCUMENT) -> Iterator[str]:
    """Yield a text, one of more than `longest` characters in pieces that end at a line end or blank where one is."""
    begin = 0
    while len(text) - begin > longest:
        limit = begin + longest
        half = begin + longest // 2
        end = text.rfind("\n", half, limit) + 1 or text.rfind(" ", half, limit) + 1 or limit
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


def split_sentences(text: str) -> list[str]:
    """Cut a text into its sentences; joined they are the text again, blanks standing at a sentence's beginning.

    A sentence ends at a line break, or at . ! ? or … before a capital or digit, but not after an abbreviation.
    """
    pieces, begin = [], 0
    for match in _BOUNDARY.finditer(text):
        if match.lastindex is None:
            continue
        end = match.start(1) if match[1] is not None else match.start(2)
        before = text[max(begin, end - _LONGEST_ABBREVIATION) : end]
        if match[1] is not None and before.endswith(".") and _ABBREVIATION.search(before):
            continue
        pieces.append(text[begin:end])
        begin = end
    pieces.append(text[begin:])
    return [piece for piece in pieces if piece]
