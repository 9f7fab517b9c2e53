"""The pages of a MediaWiki XML dump, one at a time, in memory bounded by the largest.

No tree is built: of a page only its title, namespace and newest text are kept. What no dump has is refused: a document
type, by which a few bytes become any number (entities that are made of entities), elements nested without end, tags of
a megabyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO
from xml.parsers import expat

_CHUNK = 2**16
_DEEPEST = 64
_LONGEST_TAG = 2**20


class BrokenDump(Exception):
    """What no dump has; its text says what."""


class PageTooLarge(Exception):
    """A text of more characters than allowed; its text names the page and the line."""


def read_pages(file: BinaryIO, longest: int) -> Iterator[str]:
    """Yield the wikitext of the articles of a dump (namespace 0, no redirects), each of the last revision there is.

    Raises expat.ExpatError where the XML is broken or ends too early, BrokenDump, and PageTooLarge for a text of more
    than `longest` characters.
    """
    pages = _Pages(longest)
    while chunk := file.read(_CHUNK):
        yield from pages.feed(chunk)
    yield from pages.feed(b"", last=True)


class _Pages:
    """Handlers of a parser that collect the articles."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._parser = parser = expat.ParserCreate()
        parser.buffer_text, parser.buffer_size = True, _CHUNK
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._path: list[str] = []
        self._pieces: list[str] = []
        self._length = self._fed = 0
        self._found: list[str] = []
        self._begin_page()

    def feed(self, chunk: bytes, last: bool = False) -> list[str]:
        """The articles that end in this chunk."""
        self._found = []
        self._parser.Parse(chunk, last)
        self._fed += len(chunk)
        if not last and self._fed - self._parser.CurrentByteIndex > _LONGEST_TAG:
            raise BrokenDump(f"a tag or comment of more than {_LONGEST_TAG:,} bytes: {self._where()}")
        return self._found

    def _begin_page(self) -> None:
        self._title, self._namespace, self._redirects = "", "0", False
        self._text: str | None = None

    def _start(self, name: str, _: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        parent = self._path[-1] if self._path else ""
        self._path.append(name)
        if len(self._path) > _DEEPEST:
            raise BrokenDump(f"elements nested more than {_DEEPEST} deep: {self._where()}")
        if name == "page":
            self._begin_page()
        elif name == "revision":
            self._text = None
        elif name == "redirect":
            self._redirects |= parent == "page"
        if (name in ("title", "ns") and parent == "page") or (name == "text" and parent in ("page", "revision")):
            self._pieces, self._length = [], 0
            self._parser.CharacterDataHandler = self._collect
        elif self._parser.CharacterDataHandler is not None:
            self._parser.CharacterDataHandler = None  # an element inside a text, which has none

    def _collect(self, text: str) -> None:
        self._length += len(text)
        if self._length > self._longest:
            raise PageTooLarge(self._where())
        self._pieces.append(text)

    def _end(self, _: str) -> None:
        name = self._path.pop()
        if self._parser.CharacterDataHandler is not None:
            self._parser.CharacterDataHandler = None
            self._keep(name, "".join(self._pieces))
        elif name == "page":
            if self._text and not self._redirects and self._namespace == "0":
                self._found.append(self._text)
            self._begin_page()

    def _keep(self, name: str, text: str) -> None:
        if name == "title":
            self._title = text
        elif name == "ns":
            self._namespace = text
        elif self._text is None:
            self._text = text

    def _refuse_doctype(self, *_: Any) -> None:
        raise BrokenDump(f"a document type (DOCTYPE), which no dump has: {self._where()}")

    def _where(self) -> str:
        page = f"page {self._title[:100]!r}, " if self._title else ""
        return f"{page}line {self._parser.CurrentLineNumber}"
