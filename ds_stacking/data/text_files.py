"""Read documents from local files: .txt, .jsonl and MediaWiki's .xml (all also .gz, .bz2 and .zst) and .parquet.

A file that cannot be read to its end as UTF-8 text is left out whole and its name and fault are noted in `skipped`;
a dump, too large to be read twice, is refused at the place that is broken.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from xml.etree import ElementTree

import pyarrow
import pyarrow.parquet
import zstandard

from ds_stacking.common.errors import UserError
from ds_stacking.data.documents import LONGEST_DOCUMENT
from ds_stacking.data.mediawiki import read_pages

COMPRESSED = (".gz", ".bz2", ".zst")
"""Compressions that are read."""
SUFFIXES = (*(kind + end for kind in (".txt", ".jsonl", ".xml") for end in ("", *COMPRESSED)), ".parquet")
"""Names end like this."""

Count = Callable[[int], object]
"""Is told how many more bytes of the files have been read."""

_CHUNK = 2**20
_FAULTS = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError)


def is_supported(path: Path) -> bool:
    """Whether the name of the file ends like a format that can be read."""
    return path.name.lower().endswith(SUFFIXES)


def is_dump(path: Path) -> bool:
    """Whether the file is a MediaWiki dump, whose documents are wikitext."""
    return _kind(path) == ".xml"


def read_file(path: Path, column: str, skipped: dict[str, str], count: Count = lambda _: None) -> Iterator[str]:
    """Yield the documents of one file; `column` names the column or key that holds the text.

    Faults are noted in `skipped` (file name -> what is wrong); `count` is told the bytes read. Raises UserError if the
    column is missing or a dump is broken.
    """
    kind = _kind(path)
    if kind == ".parquet":
        yield from _read_parquet(path, column, skipped, count)
    elif kind == ".xml":
        yield from _read_dump(path, count)
    elif (fault := _find_fault(path)) is not None:
        skipped[str(path)] = fault
    elif kind == ".jsonl":
        yield from _read_jsonl(path, column, skipped, count)
    else:
        yield from _read_text(path, count)


def _kind(path: Path) -> str:
    """The suffix that tells the format, that of a compression left away."""
    *_, last_but_one, last = ["", "", *path.suffixes]
    return (last_but_one if last.lower() in COMPRESSED else last).lower()


def _read_dump(path: Path, count: Count) -> Iterator[str]:
    with _open(path, count) as file:
        try:
            yield from read_pages(file)
        except (ElementTree.ParseError, *_FAULTS) as error:
            raise UserError(
                f"{path} is a broken MediaWiki dump ({first_line(error)}); download it again, or repair it there."
            ) from error


def _read_text(path: Path, count: Count) -> Iterator[str]:
    """Yield documents separated by blank lines, the input format of the original BERT."""
    lines: list[str] = []
    size = 0
    with io.TextIOWrapper(_open(path, count), encoding="utf-8-sig") as file:
        for line in iter(partial(file.readline, LONGEST_DOCUMENT), ""):
            if line.strip():
                lines.append(line)
                size += len(line)
            if lines and (size >= LONGEST_DOCUMENT or not line.strip()):
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _read_jsonl(path: Path, column: str, skipped: dict[str, str], count: Count) -> Iterator[str]:
    bad_lines = 0
    with io.TextIOWrapper(_open(path, count), encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                bad_lines += 1
                continue
            require_column(str(path), column, list(record))
            if text := as_text(record[column], str(path), column):
                # JSON can spell half of a surrogate pair, which no tokenizer accepts.
                yield text.encode("utf-8", "replace").decode() if "\\ud" in line.lower() else text
    if bad_lines:
        skipped[str(path)] = f"{bad_lines} of its lines are not JSON objects"


def _read_parquet(path: Path, column: str, skipped: dict[str, str], count: Count) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_column(str(path), column, file.schema_arrow.names)
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                count(round(bytes_per_row * len(batch)))
                for value in batch.column(0).to_pylist():
                    if text := as_text(value, str(path), column):
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        skipped[str(path)] = f"not readable as parquet ({first_line(error)})"


def require_column(where: str, column: str, present: list[str]) -> None:
    """Raise UserError unless `column` is among those present."""
    if column not in present:
        names = ", ".join(map(repr, present[:10])) or "none"
        raise UserError(f"{where} has no column {column!r}; set corpus.column to one that it has: {names}.")


def as_text(value: Any, where: str, column: str) -> str:
    """Return the text of a cell, "" for a null; raise UserError for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    kind = type(value).__name__
    raise UserError(f"Column {column!r} of {where} holds {kind}, not text; set corpus.column to a text column.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")


def _find_fault(path: Path) -> str | None:
    """Read the file once to its end; return what is wrong with it, None if it is UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(path) as file:
            while chunk := file.read(_CHUNK):
                if b"\0" in chunk:
                    return "binary, not text"
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except _FAULTS as error:
        return f"not readable ({first_line(error)})"
    return None


def _open(path: Path, count: Count = lambda _: None) -> BinaryIO:
    raw = io.BufferedReader(_CountedFile(path, count), _CHUNK)
    end = path.suffix.lower()
    if end == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if end == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(raw))
    if end == ".zst":
        return io.BufferedReader(_ZstdStream(raw), _CHUNK)
    return raw


class _CountedFile(io.FileIO):
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, count: Count) -> None:
        super().__init__(path)
        self._count = count

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        self._count(size or 0)
        return size


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file of any number of frames; raises EOFError if it is cut short.

    `zstandard`'s own stream reader takes the end of the file for the end of the text.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._frame_begun = False
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(_CHUNK)
            if not self._compressed:
                if self._frame_begun:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._frame_begun, self._compressed = not self._frame.eof, b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
