"""JSON files through typed readers: they have the shape that the code expects, or one sentence says where not.

A shape is anything that pydantic can validate: a TypedDict of the fields that are read (others are kept), a dataclass,
`dict[str, float]`. JSON that is nested a hundred thousand deep, longer than any such file or no JSON at all is refused
alike, NaN and infinite numbers wherever a shape says `Finite`. Of a file of JSON lines memory holds one line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ds_stacking.common.errors import UserError
from ds_stacking.common.own_files import LIMIT, open_inside, read_inside, read_named
from ds_stacking.common.words import shown

Shape = TypeVar("Shape")

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither NaN nor infinite."""
Count = Annotated[int, Field(ge=0)]
"""A whole number, 0 or more."""
KEEP_OTHERS = ConfigDict(extra="allow", strict=True)
"""`__pydantic_config__` of a TypedDict that keeps the fields which it does not name."""
LARGEST_SETTINGS = 1 << 20
"""Bytes of a file that a person writes."""
LONGEST_LINE = 1 << 22
"""Bytes of a line, at most."""


def read_json(path: Path, shape: type[Shape], *, mend: str, inside: Path | None = None, limit: int = LIMIT) -> Shape:
    """The content of a JSON file, validated as `shape`.

    Args:
        path: The file.
        shape: What it must hold; see above.
        mend: What its user may do about a file that is damaged, as half a sentence: "restore it, or ...".
        inside: A folder above the file, below which no link is followed. Without it, the user has named the file.
        limit: Bytes, at most.

    Raises:
        UserError: With the file, the field, what it holds and what was expected.
        OSError: For a file that is not there or cannot be read.
    """
    if inside is not None:
        content = read_inside(inside, str(path.relative_to(inside)), limit=limit)
    else:
        content = read_named(path, limit=limit)
    return parse_json(content, shape, where=str(path), mend=mend)


def parse_json(content: bytes | str, shape: type[Shape], *, where: str, mend: str) -> Shape:
    """JSON text, validated as `shape`; `where` names it in the sentence. Raises UserError."""
    try:
        return _adapter(shape).validate_json(content)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(f"{where} is damaged or no such file: {_first(error)}; {mend}.") from None


def check_value(value: Any, shape: type[Shape], *, where: str, mend: str) -> Shape:
    """A value that was read already, validated as `shape`; `where` names it in the sentence. Raises UserError."""
    try:
        return _adapter(shape).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        raise UserError(f"{where} is damaged or made up: {_first(error)}; {mend}.") from None


def read_settings(path: Path, *, where: str) -> dict[str, Any]:
    """The object of a JSON file that its user has written and named; `where` names it in the sentence.

    Raises UserError, also where a key stands there twice: `json` would let the last one win.
    """
    try:
        content = read_named(path, limit=LARGEST_SETTINGS)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); name a JSON file.") from None
    # first by a parser that neither depth nor digits exhaust
    parse_json(content, dict[str, Any], where=where, mend="mend it")
    return json.loads(content, object_pairs_hook=partial(_keys_once, where))


def _keys_once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise UserError(f"{where}: the key {shown(twice)} stands there twice; keep one.")
    return found


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape, config=None if _has_config(shape) else ConfigDict(strict=True))


def _has_config(shape: Any) -> bool:
    return hasattr(shape, "__pydantic_config__") or hasattr(shape, "model_config") or is_dataclass(shape)


def _first(error: ValidationError) -> str:
    """The first fault in words: the field, what was expected, and what is there."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "json_invalid":
        return f"it is no JSON ({fault['ctx']['error']})"
    place = ascii(".".join(map(str, fault["loc"])))[1:-1]  # a key may be long, or hold codes for a terminal
    if len(place) > 100:
        place = f"{place[:50]}...{place[-47:]}"
    problem = fault["msg"][0].lower() + fault["msg"][1:]
    found = "" if fault["type"] == "missing" else f", and is {shown(fault['input'])}"
    return f"{place or 'its content'}: {problem}{found}"


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
