"""Arrays of a folder that may have come from somebody else, memory-mapped: no link is followed, nothing is unpickled.

What such an array holds must have the type that is expected, and its file exactly the size that its header states.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from ds_stacking.common.errors import UserError
from ds_stacking.common.own_files import open_inside

_CHUNK = 2**20


class Damaged(UserError):
    """Prepared data that are not what was written, or that nobody wrote."""


def map_array(folder: Path, name: str, dtype: DTypeLike, columns: int = 0) -> np.ndarray:
    """Map the .npy file `name` of `folder` for reading: [N], or with `columns` [N, columns].

    Raises Damaged, also for a file that is not there.
    """
    path = folder / name
    with open(_open(folder, name), "rb") as file:
        try:
            if npy.read_magic(file) != (1, 0):  # only later versions have headers of more than 64 kB
                raise ValueError("a version of .npy that nobody writes here")
            shape, fortran_order, found = npy.read_array_header_1_0(file)
        except (ValueError, EOFError, RecursionError, MemoryError) as error:
            raise Damaged(f"{path} is no array ({str(error)[:80]!r}); make it again.") from None
        expected = np.dtype(dtype)
        right_shape = len(shape) == 1 + bool(columns) and (not columns or shape[1] == columns)
        if found != expected or fortran_order or not right_shape or shape[0] < 0:
            raise Damaged(f"{path} holds {found} of shape {str(shape)[:80]}, not {expected}; make it again.")
        return _map(file.fileno(), path, expected, shape, file.tell())


def map_values(folder: Path, name: str, dtype: DTypeLike, count: int) -> np.ndarray:
    """Map the file `name` of `folder`, `count` values and nothing else, for reading: [count]. Raises Damaged."""
    with open(_open(folder, name), "rb") as file:
        return _map(file.fileno(), folder / name, np.dtype(dtype), (count,), 0)


def hash_inside(folder: Path, name: str) -> str:
    """Return the sha256 of the file `name` of `folder`, no link followed. Raises Damaged."""
    hashed = sha256()
    with open(_open(folder, name), "rb") as file:
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def _open(folder: Path, name: str) -> int:
    try:
        return open_inside(folder, name)
    except UserError as error:
        raise Damaged(str(error)) from None
    except OSError as error:
        raise Damaged(f"{folder / name} cannot be read ({error.strerror}); make it again.") from None


def _map(handle: int, path: Path, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> np.ndarray:
    size, needed = os.fstat(handle).st_size, begin + dtype.itemsize * int(np.prod(shape, dtype=object))
    if size != needed:
        raise Damaged(f"{path} has {size:,} bytes instead of {needed:,}; make it again.")
    if size == begin:
        return np.zeros(shape, dtype)
    with open(handle, "rb", closefd=False) as file:
        return np.memmap(file, dtype, "r", begin, shape)
