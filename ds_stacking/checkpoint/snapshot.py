"""The copy out of the engine: all that a save costs the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.growth.holdings import Holdings
from ds_stacking.growth.state import KINDS, StateReader, TensorSlice


def pieces_to_write(pieces: Sequence[TensorSlice], everyone: Holdings, rank: int) -> list[TensorSlice]:
    """What `rank`, which holds `pieces`, writes: of what all ranks hold, each element is written by one holder.

    What several ranks hold (ZeRO 0) they share out evenly.
    """
    return [part for piece in pieces for part in _shares(piece, everyone, rank) if part.numel]


def _shares(piece: TensorSlice, everyone: Holdings, rank: int) -> Iterator[TensorSlice]:
    """Cut `piece` where the set of its holders changes; this rank's share of each part."""
    starts, stops, ranks = everyone.overlapping(*piece)[:, 1:4].unbind(1)
    borders = torch.cat([starts, stops]).clamp(piece.start, piece.stop).unique().tolist()
    for start, stop in pairwise(borders):
        holders = ranks[(starts <= start) & (stop <= stops)]
        share, count, span = int((holders < rank).sum()), len(holders), stop - start
        yield TensorSlice(piece.name, start + span * share // count, start + span * (share + 1) // count)


class Snapshot:
    """Host memory for one rank's part of a checkpoint, page-locked under a GPU and used again by the next save."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, state: StateReader, file: PieceFile) -> Tensor:
        """Copy the file's pieces from `state`: [3 * N] float32 on the host, in the file's order.

        It stays as it is until the next call.
        """
        buffer = self.reserve(state, file)
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

    def reserve(self, state: StateReader, file: PieceFile) -> Tensor:
        """The buffer for such a copy, uninitialised."""
        size = len(KINDS) * file.numel
        if self._buffer is None or self._buffer.numel() != size:
            self._buffer = None  # the old one is freed before the new one is made
            pin = size > 0 and state.read(file.pieces[0], "master").is_cuda
            self._buffer = torch.empty(size, pin_memory=pin)
        return self._buffer
