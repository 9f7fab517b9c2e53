"""Sentences of running text, by rule: no model, no download, the same on every machine."""

from __future__ import annotations

import re

_ABBREVIATIONS = (
    "mr mrs ms dr prof st sr jr messrs mme mlle rev hon gen col capt lt sgt gov sen rep pres "
    "jan feb mar apr jun jul aug sep sept oct nov dec no nos vol vols p pp fig figs ed eds vs cf ca c etc viz "
    "e.g i.e u.s u.k a.m p.m b.c a.d inc ltd co corp dept univ est approx"
)
_ABBREVIATION = re.compile(rf"(?:^|[\s(\"'“‘])(?:{'|'.join(map(re.escape, _ABBREVIATIONS.split()))}|[A-Z])\.$", re.I)
_BOUNDARY = re.compile(r"[.!?…。！？][\"'”’»)\]]*(\s+)(?=[\"'“‘«(\[]*[A-Z0-9\u00c0-\uffff])|(\s*\n\s*)|\s\s+")
"""The last, blanks without a line break, is no boundary; matched at once, they are read once."""
_LONGEST_ABBREVIATION = 12


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
