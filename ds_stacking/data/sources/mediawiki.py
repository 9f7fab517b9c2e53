"""Wikitext, the markup of MediaWiki, as plain paragraphs.

Like the data of the original BERT (Devlin et al. 2019, section 3.1) an article keeps its text passages and loses
lists, tables and headers. Expressions do it at the pace of a tokenizer, a parser that builds a tree does not. Each
takes time in proportion to the text, whatever it holds: what one attempt has read in vain no other reads again.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict, deque
from collections.abc import Callable

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_WITHOUT_TEXT = (
    "ref|math|chem|gallery|timeline|syntaxhighlight|source|score|imagemap|hiero|graph|mapframe|templatestyles"
)
_TAG_WITHOUT_TEXT = re.compile(
    rf"<(?:(?P<open>{_WITHOUT_TEXT})\b[^<>]*+>|/(?P<close>{_WITHOUT_TEXT})\s*+>)", re.IGNORECASE
)
_TEMPLATE = re.compile(r"\{\{(?:[^{}]|\{(?!\{)|\}(?!\}))*+\}\}")
_TABLE = re.compile(r"^[ \t:]*+\{\|(?:(?!^[ \t:]*+\{\||^[ \t]*+\|\}).)*+^[ \t]*+\|\}", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[\[([^\[\]]*+)\]\]")
_DEEPEST = 100
"""Templates, tables or links in each other; MediaWiki itself ends at 40 templates."""
_NAMESPACE = re.compile(r"\s*:?(?:file|image|media|category|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE)
_MEDIA = re.compile(
    r"[^|][^|:]*+:[^|]+\.(?:jpe?g|png|svg|gif|tiff?|og[agv]|webm|webp|pdf|mp3|wav|djvu)\s*+(?:\||\Z)", re.I
)
_ADDRESS = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]++[ \t]*+([^\]\n]*+)(\]?)")
"""One that is not closed in its line is matched too: no other in the rest of that line is."""
_TAG = re.compile(r"</?[a-zA-Z][^<>]*+>")
_LONG_CODE = re.compile(r"&#([0-9]{8,})")
"""Python reads no number of thousands of digits."""
_NO_PROSE = re.compile(r"^(?:=.*=[ \t]*|[*#;:|!{}].*|__[A-Z]+__[ \t]*|[ \t]*-{4,}[ \t]*)$", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"(?<![ \t])[ \t]*+\([\s,;:]*+\)")


def clean_wikitext(text: str) -> str:
    """Return the paragraphs of an article, one a line, without markup, templates, tables, lists and headings."""
    text = _COMMENT.sub("", text)
    text = _without_elements(text)
    text = _innermost_first(_TEMPLATE, "", text)
    text = _innermost_first(_TABLE, "", text)
    text = _innermost_first(_LINK, _label, text)
    text = _ADDRESS.sub(lambda match: match[1] if match[2] else match[0], text)
    text = text.replace("'''", "").replace("''", "")
    text = _NO_PROSE.sub("", text)
    text = html.unescape(_LONG_CODE.sub(_short_code, _TAG.sub("", text)))
    text = _EMPTY_BRACKETS.sub("", text)
    return "\n".join(line for line in map(str.strip, text.split("\n")) if line)


def _without_elements(text: str) -> str:
    """Remove elements whose content is no text, each up to the next closing tag of its name; without one it stays."""
    tags = list(_TAG_WITHOUT_TEXT.finditer(text))
    closing: dict[str, deque[re.Match[str]]] = defaultdict(deque)
    for tag in tags:
        if tag["close"]:
            closing[tag["close"].lower()].append(tag)
    kept, end = [], 0
    for tag in tags:
        if not tag["open"] or tag.start() < end:
            continue
        last: re.Match[str] | None = tag
        if not tag[0].endswith("/>"):
            ahead = closing[tag["open"].lower()]
            while ahead and ahead[0].start() < tag.end():
                ahead.popleft()
            last = ahead[0] if ahead else None
        if last is not None:
            kept.append(text[end : tag.start()])
            end = last.end()
    return "".join(kept) + text[end:]


def _innermost_first(pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
    """Replace what is nested from the inside out; what is never closed or nested deeper than _DEEPEST stays."""
    for _ in range(_DEEPEST):
        shorter = pattern.sub(replacement, text)
        if shorter == text:
            break
        text = shorter
    return text


def _short_code(code: re.Match[str]) -> str:
    """The number of a character in at most eight digits; none has a number of eight."""
    return "&#" + (code[1].lstrip("0")[:8] or "0")


def _label(link: re.Match[str]) -> str:
    """What a reader sees of a link: its label, else its target; nothing of pictures, categories, other languages."""
    target, _, label = link[1].partition("|")
    if _MEDIA.match(link[1]) or _NAMESPACE.match(target):
        return ""
    return label or target
