"""Where every piece of a checkpoint lies: one file, so that a rank opens no files but those whose elements it wants.

1,024 ranks that read the headers of 1,024 files would open a million files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ds_stacking.checkpoint.format import INDEX, STATE, PieceFile, parse_key, tensors_file
from ds_stacking.checkpoint.manifest import Manifest, Unusable
from ds_stacking.common.json_files import parse_json
from ds_stacking.common.own_files import open_inside, read_inside
from ds_stacking.common.words import shown
from ds_stacking.growth.holdings import Holdings
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import KINDS, Kind, TensorSlice

LONGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""
Rows = list[tuple[int, int, int, int]]
"""Pieces: number of the parameter in state.json, start, stop, rank that wrote it."""


def index_rows(pieces: Iterable[TensorSlice], names: Iterable[str], rank: int) -> Rows:
    """The pieces of one rank's file, in the file's order."""
    numbers = {name: number for number, name in enumerate(names)}
    return [(numbers[piece.name], piece.start, piece.stop, rank) for piece in pieces]


def index_bytes(tables: Iterable[Rows]) -> bytes:
    """Content of the index file, given the rows of every file: [N, 4] int64.

    Each is converted by itself: meanwhile no other thread can run, and one of them is the training loop.
    """
    rows = [torch.tensor(table, dtype=torch.int64).reshape(-1, 4) for table in tables]
    return safetensors.torch.save({"pieces": torch.cat(rows)})


class PieceIndex:
    """Finds elements in a checkpoint's files and maps these into memory when they are asked for.

    Raises Unusable where the pieces do not cover the parameters or do not fit the files.
    """

    def __init__(self, path: Path, manifest: Manifest, parameters: Mapping[str, ParameterInfo]) -> None:
        self.path, self._names = path, list(parameters)
        self._sizes = [manifest.files[tensors_file(rank)].size for rank in range(manifest.world_size)]
        _check_numels(parameters, sum(self._sizes))
        if INDEX in manifest.files:
            rows = _read_rows(path)
        else:  # format version 1
            found = [_rows_of_file(path, self._names, rank) for rank in range(manifest.world_size)]
            rows = torch.tensor([row for rows in found for row in rows], dtype=torch.int64).reshape(-1, 4)
        _check_rows(rows, [info.numel for info in parameters.values()], manifest.world_size)
        self._rows, self._numels = _with_positions(rows, manifest.world_size)
        self._held = Holdings(self._names, self._rows)
        self._files: dict[int, Tensor] = {}
        _check_cover(self._held, parameters)
        for rank in range(manifest.world_size):
            self._header_size(rank)

    def parts(self, piece: TensorSlice, kind: Kind) -> Iterator[Tensor]:
        """The elements of `piece`, one view of a mapped file after the other: [N] float32. Raises Unusable."""
        for _, start, stop, rank, position in self._held.overlapping(*piece).tolist():
            begin = KINDS.index(kind) * self._numels[rank] + position - start
            yield self._file(rank)[begin + max(start, piece.start) : begin + min(stop, piece.stop)]

    def check(self) -> None:
        """Compare the header of every file with the pieces that it should hold. Raises Unusable, OSError."""
        order = self._rows[:, 3].contiguous()
        for rank, size in enumerate(self._sizes):
            first, end = torch.searchsorted(order, torch.tensor([rank, rank + 1])).tolist()
            pieces = [
                TensorSlice(self._names[n], start, stop) for n, start, stop, *_ in self._rows[first:end].tolist()
            ]
            expected = PieceFile(pieces)
            if expected.nbytes != size or _head(self.path, rank, len(expected.header)) != expected.header:
                raise Unusable(f"the header of {tensors_file(rank)} is not that of the pieces that {INDEX} lists")

    def _file(self, rank: int) -> Tensor:
        """The elements of a file behind its header: [3 * N] float32. It is never written to."""
        if rank not in self._files:
            path, size = self.path / tensors_file(rank), self._sizes[rank]
            if path.stat().st_size != size:
                raise Unusable(f"{path.name} does not hold the pieces that {INDEX} says")
            elements = torch.from_file(str(path), shared=False, size=size // 4, dtype=torch.float32)
            self._files[rank] = elements[self._header_size(rank) // 4 :]
        return self._files[rank]

    def _header_size(self, rank: int) -> int:
        """Bytes of a file before its elements. Raises Unusable for a file too small, or not of whole elements."""
        header = self._sizes[rank] - 4 * len(KINDS) * self._numels[rank]
        if header < 8 or header % 4:
            raise Unusable(f"{tensors_file(rank)} does not hold the pieces that {INDEX} says")
        return header


def _read_rows(path: Path) -> Tensor:
    """The rows of the index file [N, 4]; what they say is checked elsewhere."""
    try:
        content = safetensors.torch.load(read_inside(path, INDEX))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Unusable(f"{INDEX} cannot be read ({str(error).splitlines()[0][:200]})") from None
    rows = content.get("pieces")
    if rows is None or len(content) != 1 or rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] != 4:
        found = ", ".join(f"{name[:60]} {tuple(t.shape)} {t.dtype}" for name, t in list(content.items())[:3])
        raise Unusable(f"{INDEX} holds {found or 'nothing'}; it must hold pieces, N rows of 4 whole numbers (int64)")
    return rows


def _rows_of_file(path: Path, names: Sequence[str], rank: int) -> Rows:
    """The pieces of a file by its header, which must be the one that such pieces have."""
    name = tensors_file(rank)
    start = _head(path, rank, 8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > LONGEST_HEADER:
        raise Unusable(f"the header of {name} is said to have {size} bytes")
    header = _head(path, rank, 8 + size)
    entries = parse_json(header[8:], dict[str, Any], where=f"the header of {name}", mend="restore it")
    try:
        pieces = [parse_key(key)[0] for key in entries if key.startswith(f"{KINDS[0]}/")]
    except ValueError:
        raise Unusable(f"the header of {name} names tensors that are none of a checkpoint") from None
    unknown = {piece.name for piece in pieces} - set(names)
    if unknown:
        raise Unusable(f"{name} holds {shown(min(unknown))}, which {STATE} does not know")
    if PieceFile(pieces).header != header:
        raise Unusable(f"{name} has another layout than a file of a checkpoint")
    return index_rows(pieces, names, rank)


def _head(path: Path, rank: int, size: int) -> bytes:
    """The first `size` bytes of a file of tensors, fewer where it is shorter."""
    with open(open_inside(path, tensors_file(rank)), "rb") as file:
        return file.read(size)


def _check_numels(parameters: Mapping[str, ParameterInfo], size: int) -> None:
    """Raise Unusable for more elements than `size` bytes can hold; so no sum of places exceeds 64 bits either."""
    numel = sum(info.numel for info in parameters.values())
    if 4 * len(KINDS) * numel > size or (numel + 1) * (len(parameters) + 1) >= 2**63:
        raise Unusable(f"its parameters have {numel:,} elements by {STATE}, more than its files hold")


def _check_rows(rows: Tensor, numels: Sequence[int], world_size: int) -> None:
    """Raise Unusable for a piece of an unknown parameter, in an unknown file, or beyond the parameter's elements."""
    number, start, stop, rank = rows.unbind(1)
    if ((number < 0) | (number >= len(numels))).any():
        raise Unusable(f"{INDEX}: its pieces are of unknown parameters")
    if ((rank < 0) | (rank >= world_size)).any():
        raise Unusable(f"{INDEX}: its pieces are in unknown files")
    if ((start < 0) | (stop < start) | (stop > torch.tensor(numels, dtype=torch.int64)[number])).any():
        raise Unusable(f"{INDEX}: its pieces lie outside their parameters")


def _with_positions(rows: Tensor, world_size: int) -> tuple[Tensor, list[int]]:
    """`rows` with the place of each piece among the masters of its file, and the elements of a kind in each file."""
    rows = rows[torch.argsort(rows[:, 3], stable=True)]
    numels = rows[:, 2] - rows[:, 1]
    of_file = torch.zeros(world_size, dtype=torch.int64).index_add_(0, rows[:, 3], numels)
    before = (of_file.cumsum(0) - of_file)[rows[:, 3]]
    return torch.cat([rows, (numels.cumsum(0) - numels - before)[:, None]], 1), of_file.tolist()


def _check_cover(held: Holdings, parameters: Mapping[str, ParameterInfo]) -> None:
    """Raise Unusable unless the pieces of every parameter, in order, cover its elements exactly once."""
    tensor, start, stop = held.rows[:, :3].unbind(1)
    first = tensor != tensor.roll(1)
    first[:1] = True
    broken = [held.names[number] for number in tensor[start != stop.roll(1).masked_fill(first, 0)].tolist()]
    sizes = held.sizes
    broken += [name for name, info in parameters.items() if sizes.get(name, 0) != info.numel]
    if broken:
        raise Unusable(f"it does not hold all of {broken[0]}")
