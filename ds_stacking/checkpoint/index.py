"""Where every piece of a checkpoint lies: one file, so that a rank opens no files but those whose elements it wants.

1,024 ranks that read the headers of 1,024 files would open a million files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ds_stacking.checkpoint.format import INDEX, PieceFile, parse_key, tensors_file
from ds_stacking.checkpoint.manifest import Manifest
from ds_stacking.growth.holdings import Holdings
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import KINDS, Kind, TensorSlice

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

    Raises ValueError where the pieces do not cover the parameters or do not fit the files.
    """

    def __init__(self, path: Path, manifest: Manifest, parameters: Mapping[str, ParameterInfo]) -> None:
        self.path = path
        names = list(parameters)
        if INDEX in manifest.files:
            rows = safetensors.torch.load((path / INDEX).read_bytes())["pieces"]
        else:  # format version 1
            found = [_rows_of_file(path / tensors_file(rank), names, rank) for rank in range(manifest.world_size)]
            rows = torch.tensor([row for rows in found for row in rows], dtype=torch.int64).reshape(-1, 4)
        if len(rows) and not 0 <= int(rows[:, 0].min()) <= int(rows[:, 0].max()) < len(names):
            raise ValueError("its pieces are of unknown parameters")
        rows, self._numels = _with_positions(rows, manifest.world_size)
        self._held = Holdings(names, rows)
        self._sizes = [manifest.files[tensors_file(rank)].size for rank in range(manifest.world_size)]
        self._files: dict[int, Tensor] = {}
        _check_cover(self._held, parameters)

    def parts(self, piece: TensorSlice, kind: Kind) -> Iterator[Tensor]:
        """The elements of `piece`, one view of a mapped file after the other: [N] float32."""
        for _, start, stop, rank, position in self._held.overlapping(*piece).tolist():
            begin = KINDS.index(kind) * self._numels[rank] + position - start
            yield self._file(rank)[begin + max(start, piece.start) : begin + min(stop, piece.stop)]

    def _file(self, rank: int) -> Tensor:
        """The elements of a file behind its header: [3 * N] float32. It is never written to."""
        if rank not in self._files:
            path, size, count = self.path / tensors_file(rank), self._sizes[rank], len(KINDS) * self._numels[rank]
            header = size - 4 * count
            if header < 8 or header % 4 or path.stat().st_size != size:
                raise ValueError(f"{path.name} does not hold the pieces that {INDEX} says")
            elements = torch.from_file(str(path), shared=False, size=size // 4, dtype=torch.float32)
            self._files[rank] = elements[header // 4 :]
        return self._files[rank]


def _rows_of_file(path: Path, names: Sequence[str], rank: int) -> Rows:
    """The pieces of a file by its header, which must be the one that such pieces have."""
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
    keys = [key for key in json.loads(header) if key.startswith(f"{KINDS[0]}/")]
    pieces = [parse_key(key)[0] for key in keys]
    if PieceFile(pieces).header != start + header:
        raise ValueError(f"{path.name} has another layout than a file of a checkpoint")
    return index_rows(pieces, names, rank)


def _with_positions(rows: Tensor, world_size: int) -> tuple[Tensor, list[int]]:
    """`rows` with the place of each piece among the masters of its file, and the elements of a kind in each file."""
    if len(rows) and not 0 <= int(rows[:, 3].min()) <= int(rows[:, 3].max()) < world_size:
        raise ValueError("its pieces are in unknown files")
    rows = rows[torch.argsort(rows[:, 3], stable=True)]
    numels = rows[:, 2] - rows[:, 1]
    of_file = torch.zeros(world_size, dtype=torch.int64).index_add_(0, rows[:, 3], numels)
    before = (of_file.cumsum(0) - of_file)[rows[:, 3]]
    return torch.cat([rows, (numels.cumsum(0) - numels - before)[:, None]], 1), of_file.tolist()


def _check_cover(held: Holdings, parameters: Mapping[str, ParameterInfo]) -> None:
    """Raise ValueError unless the pieces of every parameter, in order, cover its elements exactly once."""
    tensor, start, stop = held.rows[:, :3].unbind(1)
    first = tensor != tensor.roll(1)
    first[:1] = True
    broken = [held.names[number] for number in tensor[start != stop.roll(1).masked_fill(first, 0)].tolist()]
    sizes = held.sizes
    broken += [name for name, info in parameters.items() if sizes.get(name, 0) != info.numel]
    if broken:
        raise ValueError(f"it does not hold all of {broken[0]}")
