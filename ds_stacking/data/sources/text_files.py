"""Read documents from local files: .txt, .jsonl and MediaWiki's .xml (all also .gz, .bz2 and .zst) and .parquet.

A file that cannot be read to its end as UTF-8 text is left out whole and its name and fault are noted in `skipped`;
a dump, too large to be read twice, is refused at the place that is broken, and whatever is beyond the bounds of
SourceConfig is refused by name. No file takes more memory than these bounds allow.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.parsers import expat

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.names import first_line, printable
from ds_stacking.data.preparation.documents import LONGEST_DOCUMENT
from ds_stacking.data.sources.mediawiki_pages import BrokenDump, PageTooLarge, read_pages
from ds_stacking.data.sources.parquet_files import read_parquet, require_column
from ds_stacking.data.sources.streams import CHUNK, COMPRESSED, FAULTS, Count, open_stream

SUFFIXES = (*(kind + end for kind in (".txt", ".jsonl", ".xml") for end in ("", *COMPRESSED)), ".parquet")
"""Names end like this."""


def is_supported(path: Path) -> bool:
    """Whether the name of the file ends like a format that can be read."""
    return path.name.lower().endswith(SUFFIXES)


def is_dump(path: Path) -> bool:
    """Whether the file is a MediaWiki dump, whose documents are wikitext."""
    return _kind(path) == ".xml"


def read_file(
    path: Path, config: SourceConfig, skipped: dict[str, str], count: Count = lambda _: None
) -> Iterator[str]:
    """Yield the documents of one file; `config` names the column or key that holds the text, and the bounds.

    Faults are noted in `skipped` (printable file name -> what is wrong); `count` is told the bytes read. Raises
    UserError if the column is missing, a dump is broken or a bound is passed.
    """
    kind = _kind(path)
    if kind == ".parquet":
        yield from read_parquet(path, config, skipped, count)
    elif kind == ".xml":
        yield from _read_dump(path, config, count)
    elif (fault := _find_fault(path, config)) is not None:
        skipped[printable(path)] = fault
    elif kind == ".jsonl":
        yield from _read_jsonl(path, config, skipped, count)
    else:
        yield from _read_text(path, config, count)


def _kind(path: Path) -> str:
    """The suffix that tells the format, that of a compression left away."""
    *_, last_but_one, last = ["", "", *path.suffixes]
    return (last_but_one if last.lower() in COMPRESSED else last).lower()


def _read_dump(path: Path, config: SourceConfig, count: Count) -> Iterator[str]:
    with open_stream(path, config, count) as file:
        try:
            yield from read_pages(file, config.max_document)
        except PageTooLarge as error:
            raise UserError(
                f"{printable(path)}, {error}: a text of more than {config.max_document:,} characters; raise "
                f"corpus.max_document to read it."
            ) from None
        except (expat.ExpatError, BrokenDump, *FAULTS) as error:
            raise UserError(
                f"{printable(path)} is a broken MediaWiki dump ({first_line(error)}); download it again, or repair it "
                f"there."
            ) from error


def _read_text(path: Path, config: SourceConfig, count: Count) -> Iterator[str]:
    """Yield documents separated by blank lines, the input format of the original BERT."""
    lines: list[str] = []
    size = 0
    with io.TextIOWrapper(open_stream(path, config, count), encoding="utf-8-sig") as file:
        for line in iter(partial(file.readline, LONGEST_DOCUMENT), ""):
            if line.strip():
                lines.append(line)
                size += len(line)
            if lines and (size >= LONGEST_DOCUMENT or not line.strip()):
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _read_jsonl(path: Path, config: SourceConfig, skipped: dict[str, str], count: Count) -> Iterator[str]:
    bad_lines, column, name = 0, config.column, printable(path)
    with io.TextIOWrapper(open_stream(path, config, count), encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(partial(file.readline, config.max_document + 1), ""), 1):
            if len(line) > config.max_document:
                raise UserError(
                    f"{name}, line {number:,}: more than {config.max_document:,} characters; split it, or raise "
                    f"corpus.max_document to read it."
                )
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                bad_lines += 1
                continue
            require_column(name, column, list(record))
            if text := as_text(record[column], f"{name}, line {number:,},", column):
                # JSON can spell half of a surrogate pair, which no tokenizer accepts.
                yield text.encode("utf-8", "replace").decode() if "\\ud" in line.lower() else text
    if bad_lines:
        skipped[name] = f"{bad_lines} of its lines are not JSON objects"


def as_text(value: Any, where: str, column: str) -> str:
    """Return the text of a cell, "" for a null; raise UserError for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    kind = type(value).__name__
    raise UserError(f"Column {column!r} of {where} holds {kind}, not text; set corpus.column to a text column.")


def _find_fault(path: Path, config: SourceConfig) -> str | None:
    """Read the file once to its end; return what is wrong with it, None if it is UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_stream(path, config) as file:
            while chunk := file.read(CHUNK):
                if b"\0" in chunk:
                    return "binary, not text"
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except FAULTS as error:
        return f"not readable ({first_line(error)})"
    return None
