"""Text that was made up to take for ever is cleaned in time in proportion to its length."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ds_stacking.data.preparation.documents import clean_text, split_sentences
from ds_stacking.data.sources.mediawiki import clean_wikitext

SLOW_TEXTS = {
    "addresses": "'[//' * 10**6",
    "addresses with labels": "'[http://a ' * 400_000",
    "addresses in brackets": "'[//a[' * 400_000 + '\\n]'",
    "elements": "'<ref>' * 800_000",
    "elements of two names": "'<ref><math>' * 400_000 + '</math>'",
    "elements that are not closed": "'<ref ' * 800_000",
    "templates": "'{{a' * 200_000 + '}}' * 200_000",
    "tables": "'{|\\n' * 200_000 + '|}\\n' * 200_000",
    "links": "'[[a|' * 200_000 + ']]' * 200_000",
    "pictures": "'[[' + 'a:.jpg ' * 200_000 + ']]'",
    "blanks": "'a' + ' ' * 2_000_000 + 'b'",
    "tags": "'<a' * 10**6",
}
"""Expressions of texts that took hours, or seconds of minutes where they were shorter."""
PREPARATION = "from ds_stacking.data.preparation"
CALLS = {
    **{
        name: f"from ds_stacking.data.sources.mediawiki import clean_wikitext as f; f({t})"
        for name, t in SLOW_TEXTS.items()
    },
    "marks": f"{PREPARATION}.documents import clean_text as f; f('a' + '\\u0301' * 10**6 + '\\u0323' * 10**6)",
    "marks without a class": f"{PREPARATION}.documents import clean_text as f; f('\\u0f73' * 10**6)",
    "sentences": f"{PREPARATION}.documents import split_sentences as f; f('a.' + ' ' * 2_000_000 + 'b')",
}


@pytest.mark.parametrize("name", CALLS)
def test_time_is_linear(name: str):
    subprocess.run([sys.executable, "-c", CALLS[name]], check=True, timeout=60)


def test_what_is_not_closed_stays_and_what_is_closed_goes():
    assert clean_wikitext("a <ref>b <math>c</math> d <REF name=x>e</ref > f<ref/>g <ref>h") == "a  fg h"
    assert clean_wikitext("[http://a b [//c\n[http://a b] [http://a [c] d]") == "[http://a b [//c\nb [c d]"
    assert clean_wikitext("{{a" * 90 + "}}" * 90 + "y") == "y"


@pytest.mark.parametrize(
    ("code", "character"),
    [("1" * 5000, "\ufffd"), ("0" * 5000 + "65", "A"), ("0" * 5000, "\ufffd"), ("00000065", "A"), ("65", "A")],
)
def test_numbers_of_characters_may_be_long(code: str, character: str):
    assert clean_wikitext(f"x&#{code};y") == f"x{character}y"


def test_a_character_keeps_thirty_marks():
    marks = "\u0323" * 10 + "\u0301" * 50
    assert clean_text(f"x{marks}y") == f"x{marks[:30]}y"
    assert clean_text(f"x{marks[:30]}y") == f"x{marks[:30]}y"


def test_blanks_are_no_boundary():
    assert split_sentences("one   two.  Three  \n  four") == ["one   two.", "  Three", "  \n  four"]
