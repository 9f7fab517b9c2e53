"""Read documents from .parquet files, in bounded memory and whatever bytes their text column holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.names import first_line, printable
from ds_stacking.data.streams import PLAUSIBLE

_ROWS = 256
_BATCH_BYTES = 2**25


def read_parquet(
    path: Path, config: SourceConfig, skipped: dict[str, str], count: Callable[[int], object]
) -> Iterator[str]:
    """Yield the texts of one file; rows that are not UTF-8 are left out and counted in `skipped`.

    Raises UserError for a wrong column and for what lies beyond the bounds of `config`.
    """
    name, column = printable(path), config.column
    not_text = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_column(name, column, file.schema_arrow.names)
            _require_text(name, column, file.schema_arrow.field(file.schema_arrow.names.index(column)).type)
            rows_at_once = _plausible_rows(name, column, file.metadata, config.max_expansion)
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            row = 0
            for batch in file.iter_batches(batch_size=rows_at_once, columns=[column]):
                count(round(bytes_per_row * len(batch)))
                for value in _values(batch.column(0), f"{name}, rows {row:,} to {row + len(batch):,}", config):
                    try:
                        if value:
                            yield value.decode()
                    except UnicodeDecodeError:
                        not_text += 1
                row += len(batch)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        skipped[name] = f"not readable as parquet ({first_line(error)})"
    if not_text:
        skipped[name] = f"{not_text} of its rows are not UTF-8 text"


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


def _plausible_rows(where: str, column: str, metadata: pyarrow.parquet.FileMetaData, most: int) -> int:
    """Rows to read at once, so that they hold some MB on average. Raises UserError for an implausible size."""
    packed = unpacked = 0
    largest_row = 1.0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema == column:
                packed += max(0, chunk.total_compressed_size)
                unpacked += max(0, chunk.total_uncompressed_size)
                largest_row = max(largest_row, chunk.total_uncompressed_size / max(1, group.num_rows))
    if unpacked > max(PLAUSIBLE, most * packed):
        raise UserError(
            f"Column {column!r} of {where} becomes more than {most:,} times its size when it is decompressed, as no "
            f"text does; remove the file, or raise corpus.max_expansion if it is right."
        )
    return max(1, min(_ROWS, int(_BATCH_BYTES / largest_row)))


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
