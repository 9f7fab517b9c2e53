"""Wikitext, the markup of MediaWiki, as plain paragraphs.

Like the data of the original BERT (Devlin et al. 2019, section 3.1) an article keeps its text passages and loses
lists, tables and headers. Expressions do it at the pace of a tokenizer, a parser that builds a tree does not.
"""

from __future__ import annotations

import html
import re

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_WITHOUT_TEXT = (
    "ref|math|chem|gallery|timeline|syntaxhighlight|source|score|imagemap|hiero|graph|mapframe|templatestyles"
)
_ELEMENT = re.compile(rf"<({_WITHOUT_TEXT})\b(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE)
_TEMPLATE = re.compile(r"\{\{(?:[^{}]|\{(?!\{)|\}(?!\}))*\}\}")
_TABLE = re.compile(r"^[ \t:]*\{\|(?:(?!^[ \t:]*\{\||^[ \t]*\|\}).)*^[ \t]*\|\}", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NAMESPACE = re.compile(r"\s*:?(?:file|image|media|category|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE)
_MEDIA = re.compile(r"[^|]+:[^|]+\.(?:jpe?g|png|svg|gif|tiff?|og[agv]|webm|webp|pdf|mp3|wav|djvu)\s*(?:\||\Z)", re.I)
_ADDRESS = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+[ \t]*([^\]\n]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_NO_PROSE = re.compile(r"^(?:=.*=[ \t]*|[*#;:|!{}].*|__[A-Z]+__[ \t]*|[ \t]*-{4,}[ \t]*)$", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"[ \t]*\([\s,;:]*\)")


def clean_wikitext(text: str) -> str:
    """Return the paragraphs of an article, one a line, without markup, templates, tables, lists and headings."""
    text = _COMMENT.sub("", text)
    text = _ELEMENT.sub("", text)
    text = _innermost_first(_TEMPLATE, "", text)
    text = _innermost_first(_TABLE, "", text)
    while (shorter := _LINK.sub(_label, text)) != text:
        text = shorter
    text = _ADDRESS.sub(r"\1", text).replace("'''", "").replace("''", "")
    text = _NO_PROSE.sub("", text)
    text = html.unescape(_TAG.sub("", text))
    text = _EMPTY_BRACKETS.sub("", text)
    return "\n".join(line for line in map(str.strip, text.split("\n")) if line)


def _innermost_first(pattern: re.Pattern, replacement: str, text: str) -> str:
    """Replace what is nested from the inside out; what is never closed stays, and costs nothing around it."""
    while (shorter := pattern.sub(replacement, text)) != text:
        text = shorter
    return text


def _label(link: re.Match) -> str:
    """What a reader sees of a link: its label, else its target; nothing of pictures, categories, other languages."""
    target, _, label = link[1].partition("|")
    if _MEDIA.match(link[1]) or _NAMESPACE.match(target):
        return ""
    return label or target
