"""Files of JSON lines through a typed reader, a line at a time: as large as they may be, memory holds one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import parse_json
from ds_stacking.common.own_files import open_inside

Shape = TypeVar("Shape")

LONGEST_LINE = 1 << 22
"""Bytes of a line, at most."""


def read_json_lines(path: Path, shape: type[Shape], *, mend: str, inside: Path) -> Iterator[tuple[int, Shape]]:
    """Yield the number of every line's bytes and the line, validated as `shape`.

    A last line without an end, as a killed process leaves it, is passed over unless it is whole.

    Args:
        path: The file, which programs write into the folder `inside`, below which no link is followed.
        shape: What a line must hold (common/json_files.py).
        mend: What its user may do about a line that is damaged, as half a sentence.

    Raises:
        UserError: With the file, the line, the field, what it holds and what was expected.
        OSError: For a file that is not there or cannot be read.
    """
    handle = open_inside(inside, os.fspath(path.relative_to(inside)))
    with open(handle, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path} line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where} has more than {LONGEST_LINE:,} bytes, which no such line needs; {mend}.")
            try:
                found = parse_json(line, shape, where=where, mend=mend)
            except UserError:
                if not line.endswith(b"\n"):
                    return
                raise
            yield len(line), found
