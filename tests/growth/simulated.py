"""Ranks as threads of one process, and a store cut into arbitrary pieces: the executor without engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ds_stacking.growth.exchange import Exchange, with_ranks
from ds_stacking.growth.state import KINDS, Kind, StateWriter, TensorSlice


class ThreadRank(Exchange):
    """One rank's end of the exchange; a blackboard carries what ranks tell each other."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self.world_size, self._barrier, self._board = rank, world_size, barrier, board
        self.elements_sent = 0

    def _share(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(timeout=60)
        everyone = [self._board[rank] for rank in range(self.world_size)]
        self._barrier.wait(timeout=60)
        return everyone

    def gather_slices(self, rows: Tensor) -> Tensor:
        return with_ranks(self._share(rows))

    def all_to_all(
        self, send: Sequence[Sequence[Tensor]], receive_sizes: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        joined = [torch.cat([torch.empty(0, dtype=dtype), *parts]) for parts in send]
        self.elements_sent += sum(part.numel() for part in joined)
        incoming = [parts[self.rank].clone() for parts in self._share(joined)]
        assert [part.numel() for part in incoming] == list(receive_sizes)
        return incoming

    def all_reduce_tensor(self, values: Tensor) -> Tensor:
        return sum(self._share(values))


def run_threads(world_size: int, case: Callable[[ThreadRank], Any]) -> list[Any]:
    """Call `case` on every simulated rank; the results by rank."""
    barrier, board = threading.Barrier(world_size), {}

    def run(rank: int) -> Any:
        try:
            return case(ThreadRank(rank, world_size, barrier, board))
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


class ShardState(StateWriter):
    """What one rank holds: given pieces of full tensors, or uninitialised ones (masters) and zeros (moments)."""

    def __init__(self, pieces: Sequence[TensorSlice], full: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        self.pieces = list(pieces)
        self.steps: dict[str, int] = {}
        self.values: dict[tuple[str, str], list[tuple[TensorSlice, Tensor]]] = {}
        for kind in KINDS:
            for piece in pieces:
                values = torch.full((piece.numel,), float("nan") if kind == "master" else 0.0)
                if full is not None:
                    values = full[kind][piece.name][piece.start : piece.stop].clone()
                self.values.setdefault((kind, piece.name), []).append((piece, values))

    def slices(self) -> list[TensorSlice]:
        return self.pieces

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        for held, values in self.values[kind, piece.name]:
            if held.start <= piece.start and piece.stop <= held.stop:
                return values[piece.start - held.start : piece.stop - held.start]
        raise AssertionError(f"{piece} is not on this rank")

    def commit(self, steps: Mapping[str, int]) -> None:
        self.steps = dict(steps)


def assemble(shards: Sequence[ShardState], numels: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """The full tensors that the shards hold together; elements that nobody holds are NaN."""
    full = {kind: {name: torch.full((numel,), float("nan")) for name, numel in numels.items()} for kind in KINDS}
    for shard in shards:
        for (kind, name), parts in shard.values.items():
            for piece, values in parts:
                full[kind][name][piece.start : piece.stop] = values
    return full
