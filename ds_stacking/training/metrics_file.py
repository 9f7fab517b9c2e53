"""metrics.jsonl: one record to a line, written at once, cut back at a resumption; what is no such file is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import finite
from ds_stacking.common.json_files import KEEP_OTHERS, Count, parse_json
from ds_stacking.common.own_files import open_inside
from ds_stacking.training.run_directory import METRICS

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

LONGEST_LINE = 1 << 22
"""Bytes."""
LARGEST = 1 << 32
"""Bytes of the file: some ten million lines."""
MEND = "move the file away, and the run goes on without its past metrics"


class Line(TypedDict):
    """What every record has."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: str
    step: Count
    stage: Count
    layers: Count


class MetricsFile:
    """Appends each record as one JSON line, flushed at once; a number that is not finite becomes null.

    Where the disk is full, lines wait in memory for a better time, and training goes on.
    """

    def __init__(self, path: Path) -> None:
        """Open the file `path` of a run directory; a link is refused. Raises UserError."""
        self.path = path
        try:
            handle = open_inside(path.parent, path.name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise UserError(
                f"Cannot write {path} ({error.strerror}); choose an output_dir that can be written."
            ) from error
        self.file = open(handle, "ab+", buffering=0)  # noqa: SIM115 (close() closes it)
        self._waiting = b""
        self._drop_broken_tail()

    def log(self, record: Record) -> None:
        """Take one record."""
        self._waiting += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, if any and if possible."""
        if not self._waiting:
            return
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(end)
            logger.warning("%s cannot be written (%s); its lines wait.", self.path, error.strerror)
        else:
            self._waiting = b""

    def close(self, exit_code: int = 0) -> None:
        """Write what is left."""
        self.flush()
        self.file.close()

    def _drop_broken_tail(self) -> None:
        """Cut off a line that a killed process left unfinished, else the next record would be glued to it."""
        end = self.file.seek(0, os.SEEK_END)
        start = self.file.seek(max(0, end - LONGEST_LINE))
        tail = self.file.read(LONGEST_LINE)
        if start and b"\n" not in tail:
            self.file.close()
            raise UserError(f"{self.path} is damaged: its last line has more than {LONGEST_LINE:,} bytes; {MEND}.")
        self.file.truncate(start + tail.rfind(b"\n") + 1)


def check_metrics(run_dir: Path, size: int) -> str | None:
    """Look at the first `size` bytes, which a resumption keeps, a line at a time; what is to be said of them.

    Raises UserError where they are not lines of metrics: the reports at the end could not be made.
    """
    path = run_dir / METRICS
    try:
        file = open(open_inside(run_dir, METRICS), "rb")  # noqa: SIM115 (the with below closes it)
    except FileNotFoundError:
        return f"{path} is gone; the run goes on without its past metrics" if size else None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions, or {MEND}.") from None
    with file:
        there = os.fstat(file.fileno()).st_size
        if there > LARGEST:
            raise UserError(f"{path} has {there:,} bytes, more than any run writes; {MEND}.")
        number = 0
        while file.tell() < size and (line := file.readline(LONGEST_LINE)):
            number += 1
            if not line.endswith(b"\n") and file.tell() < there:
                raise UserError(f"{path} is damaged: line {number} has more than {LONGEST_LINE:,} bytes; {MEND}.")
            if line.endswith(b"\n"):
                parse_json(line, Line, where=f"{path}, line {number},", mend=MEND)
    if there < size:
        return f"{path} has {there:,} bytes, and had {size:,} at the checkpoint; what is missing stays so"
    return None


def cut_metrics(run_dir: Path, size: int) -> None:
    """Cut the file back to its first `size` bytes, so that no step stands twice. Raises OSError."""
    try:
        handle = open_inside(run_dir, METRICS, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        if os.fstat(handle).st_size > size:
            os.ftruncate(handle, size)
    finally:
        os.close(handle)
