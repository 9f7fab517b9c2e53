"""Read documents from .parquet files, in bounded memory and whatever bytes their text column holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.names import first_line, printable
from ds_stacking.data.sources.parquet_pages import Page, read_pages
from ds_stacking.data.sources.streams import PLAUSIBLE

_ROWS = 256
_BATCH_BYTES = 2**25
_DICTIONARY_BYTES = 2**28
_PAGE_DOCUMENTS = 16
"""Documents of the largest size that a page may hold: writers put a thousand of the usual size into one."""


def read_parquet(
    path: Path, config: SourceConfig, skipped: dict[str, str], count: Callable[[int], object]
) -> Iterator[str]:
    """Yield the texts of one file; rows that are not UTF-8 are left out and counted in `skipped`.

    Raises UserError for a wrong column and for what lies beyond the bounds of `config`.
    """
    name, column = printable(path), config.column
    not_text = row = size = 0
    try:
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(path) as file:
            require_column(name, column, file.schema_arrow.names)
            _require_text(name, column, file.schema_arrow.field(file.schema_arrow.names.index(column)).type)
            packed = path.stat().st_size
            bytes_per_row = packed / max(1, file.metadata.num_rows)
            for batch in _batches(file, raw, name, config):
                count(round(bytes_per_row * len(batch)))
                for value in _values(batch.column(0), f"{name}, rows {row:,} to {row + len(batch):,}", config):
                    if not value:
                        continue
                    size += len(value)  # one value may stand in any number of rows
                    _require_plausible(size, packed, f"{name}: column {column!r}", config)
                    try:
                        text = value.decode()
                    except UnicodeDecodeError:
                        not_text += 1
                        continue
                    yield text
                row += len(batch)
    except (pyarrow.ArrowException, OSError, MemoryError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        skipped[name] = f"not readable as parquet ({first_line(error)})"
        return
    if not_text:
        skipped[name] = f"{not_text} of its rows are not UTF-8 text"


def _batches(
    file: pyarrow.parquet.ParquetFile, raw: BinaryIO, where: str, config: SourceConfig
) -> Iterator[pyarrow.RecordBatch]:
    """The column's batches, each of some MB on average."""
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = map(group.column, range(group.num_columns))
        pages = [page for chunk in chunks if chunk.path_in_schema == config.column for page in read_pages(raw, chunk)]
        rows = _rows_at_once(pages, f"{where}, row group {number}", config)
        yield from file.iter_batches(batch_size=rows, row_groups=[number], columns=[config.column])


def _rows_at_once(pages: list[Page], where: str, config: SourceConfig) -> int:
    """Rows to read together, so that they take some MB on average. Raises UserError for pages beyond the bounds."""
    packed, unpacked = sum(page.packed for page in pages), sum(page.unpacked for page in pages)
    _require_plausible(unpacked, packed, f"{where}: column {config.column!r}", config)
    largest = max((page.unpacked for page in pages), default=0)
    if largest > _PAGE_DOCUMENTS * config.max_document:
        raise UserError(
            f"{where}: a page of column {config.column!r} has {largest:,} bytes, more than {_PAGE_DOCUMENTS} times "
            f"corpus.max_document ({config.max_document:,}); write it with smaller pages, or raise that."
        )
    values = max((page.unpacked / page.values for page in pages), default=0)
    dictionary = max((page.unpacked for page in pages if page.is_dictionary), default=0)
    return max(1, min(_ROWS, int(_BATCH_BYTES / max(1, values)), int(_DICTIONARY_BYTES / max(1, dictionary))))


def require_column(where: str, column: str, present: list[str]) -> None:
    """Raise UserError unless `column` is among those present."""
    if column not in present:
        names = ", ".join(ascii(name) if len(name) < 60 else f"{ascii(name[:60])}..." for name in present[:10])
        raise UserError(f"{where} has no column {column!r}; set corpus.column to one that it has: {names or 'none'}.")


def _require_text(where: str, column: str, kind: pyarrow.DataType) -> None:
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    known = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not (pyarrow.types.is_null(inner) or any(is_known(inner) for is_known in known)):
        raise UserError(f"Column {column!r} of {where} holds {kind}, not text; set corpus.column to a text column.")


def _require_plausible(unpacked: int, packed: int, where: str, config: SourceConfig) -> None:
    if unpacked > max(PLAUSIBLE, config.max_expansion * packed):
        raise UserError(
            f"{where} becomes more than {config.max_expansion:,} times its size when it is decompressed, as no text "
            f"does; remove the file, or raise corpus.max_expansion if it is right."
        )


def _values(array: pyarrow.Array, where: str, config: SourceConfig) -> Iterator[bytes | None]:
    """The bytes of an array's texts, one at a time; a text need not be UTF-8 because its column says so."""
    if pyarrow.types.is_null(array.type):
        return
    if pyarrow.types.is_dictionary(array.type):
        values = array.dictionary.cast(pyarrow.large_binary())
        _require_size(values, where, config.max_document)
        yield from (None if index is None else values[index].as_py() for index in array.indices.to_pylist())
        return
    values = array.cast(pyarrow.large_binary())
    _require_size(values, where, config.max_document)
    yield from (value.as_py() for value in values)


def _require_size(values: pyarrow.Array, where: str, most: int) -> None:
    longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
    if longest > most:
        raise UserError(
            f"{where}: a text has {longest:,} bytes, more than corpus.max_document ({most:,}); split it, or raise "
            f"that."
        )
