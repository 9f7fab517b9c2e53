"""The copy out of the engine: all that a save costs the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.growth.state import KINDS, StateReader, TensorSlice


def responsible(tables: Sequence[Sequence[TensorSlice]], rank: int) -> list[TensorSlice]:
    """What `rank` writes, given what every rank holds: each element is written by one of its holders.

    What several ranks hold (ZeRO 0) they share out evenly.
    """
    holders: dict[str, list[tuple[int, TensorSlice]]] = {}
    for holder, table in enumerate(tables):
        for piece in table:
            holders.setdefault(piece.name, []).append((holder, piece))
    return [part for piece in tables[rank] for part in _shares(piece, holders[piece.name], rank) if part.numel]


def _shares(piece: TensorSlice, held: list[tuple[int, TensorSlice]], rank: int) -> Iterator[TensorSlice]:
    """Cut `piece` where the set of its holders changes; this rank's share of each part."""
    overlapping = [(r, other) for r, other in held if other.start < piece.stop and piece.start < other.stop]
    edges = {edge for _, other in overlapping for edge in (other.start, other.stop)}
    borders = sorted(edge for edge in edges if piece.start <= edge <= piece.stop)
    for start, stop in pairwise(borders):
        ranks = sorted(r for r, other in overlapping if other.start <= start and stop <= other.stop)
        share, count, span = ranks.index(rank), len(ranks), stop - start
        yield TensorSlice(piece.name, start + span * share // count, start + span * (share + 1) // count)


class Snapshot:
    """Host memory for one rank's part of a checkpoint, page-locked under a GPU and used again by the next save."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, state: StateReader, file: PieceFile) -> Tensor:
        """Copy the file's pieces from `state`: [3 * N] float32 on the host, in the file's order.

        It stays as it is until the next call.
        """
        buffer = self._reserve(state, file)
        on_device = False
        for kind in KINDS:
            for piece in file.pieces:
                values = state.read(piece, kind)
                at = file.position(piece, kind)
                buffer[at : at + piece.numel].copy_(values, non_blocking=True)
                on_device |= values.is_cuda
        if on_device:
            torch.cuda.current_stream().synchronize()
        return buffer

    def _reserve(self, state: StateReader, file: PieceFile) -> Tensor:
        size = len(KINDS) * file.numel
        if self._buffer is None or self._buffer.numel() != size:
            self._buffer = None  # the old one is freed before the new one is made
            pin = size > 0 and state.read(file.pieces[0], "master").is_cuda
            self._buffer = torch.empty(size, pin_memory=pin)
        return self._buffer
