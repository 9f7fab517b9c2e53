"""MediaWiki dumps: which pages are taken, what is left of their markup, and dumps that are broken."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.sources.mediawiki import clean_wikitext
from ds_stacking.data.sources.text_files import read_file

WIKITEXT = """{{Short description|x}}
{{Infobox person|name={{nowrap|A {b} C}}|born={{birth date|1900}}}}
[[File:a.jpg|thumb|A picture with a [[link|label]] in it]]
'''Anarchism''' is a [[political philosophy]] that is [[skepticism|''sceptical'']] of authority ({{lang|el|x}}).<ref
name="a">Not {{cite|t}} this</ref> It calls<ref name="a" /> for &ldquo;freedom&rdquo;.<!-- nor
this -->

== History ==
* an item
{| class="wikitable"
| a || b
{|
| nested
|}
|}
See [http://x.org the site] and [[w:Page]] <math>a^{2}</math>at <b>work</b>; [[Star Trek: Voyager]] ran.
[[Category:Politics]]
[[de:Anarchismus]]
__NOTOC__
An unclosed {{template stays
"""
PLAIN = """Anarchism is a political philosophy that is sceptical of authority. It calls for \u201cfreedom\u201d.
See the site and w:Page at work; Star Trek: Voyager ran.
An unclosed {{template stays"""
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">
<siteinfo><sitename>W</sitename></siteinfo>
<page><title>A</title><ns>0</ns><revision><text xml:space="preserve">one &amp; ''two''</text></revision></page>
<page><title>R</title><ns>0</ns><redirect title="A"/><revision><text>#REDIRECT [[A]]</text></revision></page>
<page><title>Talk:A</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>E</title><ns>0</ns><revision><text/></revision></page>
<page><title>B</title><ns>0</ns><revision><text>three</text></revision></page>
</mediawiki>"""


def test_paragraphs_are_left():
    assert clean_wikitext(WIKITEXT) == PLAIN


@pytest.mark.parametrize("suffix", ["", ".bz2", ".gz"])
def test_articles_of_a_dump(tmp_path: Path, suffix: str):
    compress = {"": bytes, ".bz2": bz2.compress, ".gz": gzip.compress}[suffix]
    path = tmp_path / f"dump.xml{suffix}"
    path.write_bytes(compress(DUMP.encode()))
    counted: list[int] = []
    assert list(read_file(path, SourceConfig(), {}, counted.append)) == ["one & ''two''", "three"]
    assert sum(counted) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.xml", DUMP.encode()[:-40]),
        ("broken.xml", DUMP.replace("</page>", "", 1).encode()),
        ("latin.xml", DUMP.replace("three", "caf\u00e9").encode("latin-1")),
        ("cut.xml.bz2", bz2.compress(DUMP.encode() * 50)[:-20]),
        ("no.xml.bz2", b"no bzip2 at all"),
        ("empty.xml", b""),
    ],
)
def test_a_broken_dump_is_refused_by_name(tmp_path: Path, name: str, data: bytes):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is a broken MediaWiki dump \(.+\); download it again") as caught:
        list(read_file(path, SourceConfig(), {}))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
