"""Who holds what: the slices of all ranks as sorted numbers, since 1,024 ranks hold half a million of them.

Shapes: N slices of all ranks, K found ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.state import TensorSlice


class Holdings:
    """Slices of the tensors `names`, to be searched by place; `rows` gives them sorted by tensor and start.

    A row is (tensor, start, stop, rank, ...), the tensor being an index into `names`: [N, 4 or more] int64.
    """

    def __init__(self, names: Sequence[str], rows: Tensor) -> None:
        self.names = list(names)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        rows = rows[rows[:, 1] < rows[:, 2]]
        self.span = 1 + (int(rows[:, 2].max()) if len(rows) else 0)
        self.rows = rows[torch.argsort(self._place(rows[:, 0], rows[:, 1]), stable=True)]
        self._starts = self._place(self.rows[:, 0], self.rows[:, 1]).contiguous()
        stops = self._place(self.rows[:, 0], self.rows[:, 2])
        self._stops = stops.cummax(0).values if len(rows) else stops
        """The largest stop so far: no slice before the first of these beyond a place reaches that place."""

    @property
    def sizes(self) -> dict[str, int]:
        """Where the last slice of every tensor stops; a tensor that nobody holds is left out."""
        stops = torch.zeros(len(self.names), dtype=torch.int64)
        stops.scatter_reduce_(0, self.rows[:, 0], self.rows[:, 2], "amax")
        return {name: stop for name, stop in zip(self.names, stops.tolist(), strict=True) if stop}

    def overlapping(self, name: str, start: int, stop: int) -> Tensor:
        """The rows that have elements of start..stop of the tensor `name`, sorted by start: [K, 4 or more]."""
        base = self.numbers[name] * self.span
        first = torch.searchsorted(self._stops, base + min(start, self.span - 1), right=True)
        end = torch.searchsorted(self._starts, base + min(stop, self.span))
        rows = self.rows[first:end]
        return rows[rows[:, 2] > start]

    def covers(self, rows: Tensor) -> Tensor:
        """Whether a rank has all of a slice itself, in one piece: `rows` [K, 4 or more] -> [K] bool."""
        own = self.rows[torch.argsort(self._place_on_rank(self.rows), stable=True)]
        if not len(own):
            return torch.zeros(len(rows), dtype=torch.bool)
        # the piece that begins at the slice's start, or is the last of this rank and tensor to begin before it
        at = torch.searchsorted(self._place_on_rank(own), self._place_on_rank(rows), right=True) - 1
        found = own[at.clamp_min(0)]
        same = (found[:, 0] == rows[:, 0]) & (found[:, 3] == rows[:, 3])
        return (at >= 0) & same & (found[:, 2] >= rows[:, 2])

    def _place(self, tensor: Tensor, element: Tensor) -> Tensor:
        """One number for an element of a tensor, in the order of both."""
        return tensor * self.span + element

    def _place_on_rank(self, rows: Tensor) -> Tensor:
        return self._place(rows[:, 3] * len(self.names) + rows[:, 0], rows[:, 1].clamp_max(self.span - 1))


def holdings(pieces: Iterable[TensorSlice], names: Iterable[str], exchange: Exchange) -> Holdings:
    """What all ranks hold of the tensors `names`, given this rank's `pieces` of any tensors. Collective."""
    numbers = {name: number for number, name in enumerate(names)}
    own = [(numbers[piece.name], piece.start, piece.stop) for piece in pieces if piece.name in numbers]
    everyone = exchange.gather_slices(torch.tensor(own, dtype=torch.int64).reshape(-1, 3))
    return Holdings(list(numbers), everyone.roll(-1, 1))  # the rank behind the slice
