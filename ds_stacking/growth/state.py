"""Training state by parameter name: what every store offers, be it live engines, checkpoints or a dictionary.

Shapes: every tensor here is a flat view, [N] float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")


class TensorSlice(NamedTuple):
    """Elements start..stop of the flattened full tensor `name`."""

    name: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class StateReader(Protocol):
    """A store to read from. Every rank sees its own part."""

    def slices(self) -> Sequence[TensorSlice]:
        """What this rank holds; over all ranks every element at least once."""
        ...

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """The elements of `piece`, a part of one of `slices()`: [N] float32, a view where the store has one."""
        ...


class StateWriter(StateReader, Protocol):
    """A store to write to; it can be read back."""

    def write(self, piece: TensorSlice, kind: Kind, values: Tensor) -> None:
        """Set the elements of `piece` ([N] float32 on any device), by default in the view that `read` gives."""
        self.read(piece, kind).copy_(values)

    def commit(self, steps: Mapping[str, int]) -> None:
        """Called once after the last write, by all ranks, with the step count of every tensor."""
        ...


class FullState(StateWriter):
    """A store of full tensors in host memory; with `holder=False` this rank holds nothing.

    It consolidates a sharded model on one rank, and it is the simplest store to test against.
    """

    def __init__(self, numels: Mapping[str, int], *, kinds: Sequence[Kind] = KINDS, holder: bool = True) -> None:
        self.numels = dict(numels) if holder else {}
        self.steps: dict[str, int] = {}
        self.tensors = {kind: {name: torch.zeros(n) for name, n in self.numels.items()} for kind in kinds}

    def slices(self) -> list[TensorSlice]:
        """Every tensor, whole."""
        return [TensorSlice(name, 0, numel) for name, numel in self.numels.items()]

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """A view of the stored tensor."""
        return self.tensors[kind][piece.name][piece.start : piece.stop]

    def commit(self, steps: Mapping[str, int]) -> None:
        """Keep the step counts."""
        self.steps = dict(steps)


class ParkedState:
    """A copy in host memory of what this rank holds of another store (a StateReader)."""

    def __init__(self, reader: StateReader, *, kinds: Sequence[Kind] = KINDS) -> None:
        self._slices = list(reader.slices())
        self._values = {
            kind: {piece.name: (piece.start, reader.read(piece, kind).to("cpu", copy=True)) for piece in self._slices}
            for kind in kinds
        }

    def slices(self) -> list[TensorSlice]:
        """What the other store held."""
        return self._slices

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """A view of the copy."""
        start, values = self._values[kind][piece.name]
        return values[piece.start - start : piece.stop - start]
