"""What the pages of a parquet column take when they are decompressed, by their headers, before a library reads them.

A page of a few kB may state that it holds gigabytes, and a value that stands in the dictionary once may be meant a
million times. Headers are structs of Thrift's compact protocol, https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet

_HEADER = 2**14
_LONGEST_HEADER = 2**24
_DEEPEST = 8
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 2, 3, 5, 7, 8
"""Numbers of fields of a header; the last three are structs, whose first field is the number of values."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page."""

    packed: int
    """Bytes in the file."""
    unpacked: int
    """Bytes after decompression."""
    values: int
    """How many values it holds, at least 1."""
    is_dictionary: bool
    """Whether other pages refer to its values."""


def read_pages(file: BinaryIO, chunk: pyarrow.parquet.ColumnChunkMetaData) -> Iterator[Page]:
    """Yield the pages of a column in a row group. Raises ValueError for headers that are none."""
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < at:
        at = chunk.dictionary_page_offset
    end = at + chunk.total_compressed_size
    while at < end:
        fields, length = _header(file, at)
        about = fields.get(_DATA) or fields.get(_DATA_2) or fields.get(_DICTIONARY) or {}
        page = Page(
            packed=fields.get(_PACKED, -1),
            unpacked=fields.get(_UNPACKED, -1),
            values=max(1, about.get(1, 1)),
            is_dictionary=_DICTIONARY in fields,
        )
        if page.packed < 0 or page.unpacked < 0:
            raise ValueError("a page without a size")
        yield page
        at += length + page.packed


def _header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """The fields of the header that begins there, and its length."""
    for size in (_HEADER, _LONGEST_HEADER):
        file.seek(at)
        data = file.read(size)
        try:
            return _struct(data, 0, 0)
        except IndexError:
            if len(data) < size:
                break
    raise ValueError("a page header that does not end")


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number, and the place behind it. Raises IndexError where the data end before."""
    if depth > _DEEPEST:
        raise ValueError("a page header that is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        step, kind = kind >> 4, kind & 15
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind == 3:
            at += 1
        elif kind in (4, 5, 6):
            fields[number], at = _integer(data, at)
        elif kind == 7:
            at += 8
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            fields[number], at = _struct(data, at, depth + 1)
        else:
            raise ValueError("a page header with fields that none has")
    return fields, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a page header with a number that does not end")
