"""Small states in a dictionary, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.growth.exchange import Exchange, OneRank
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import KINDS, FullState, TensorSlice

NUMELS = {"embedding": 1009, "blocks.0.weight": 31, "blocks.0.bias": 1, "blocks.1.weight": 31, "blocks.1.bias": 1}
PARAMETERS = {name: ParameterInfo(numel=n, decay=n > 1, birth=n % 2, step=5) for name, n in NUMELS.items()}
IDENTITY = {"model": {"layers": 2, "width": 30}, "recipe": "tiny"}


def random_state(seed: int, numels: Mapping[str, int] = NUMELS) -> FullState:
    """Every kind of every tensor with values of its own."""
    state = FullState(numels)
    generator = torch.Generator().manual_seed(seed)
    for kind in KINDS:
        for values in state.tensors[kind].values():
            values.normal_(generator=generator)
    return state


class Shard:
    """One rank's part of a FullState: equal parts of all tensors laid end to end, as ZeRO 2 cuts them."""

    def __init__(self, full: FullState, rank: int, world_size: int) -> None:
        self.full = full
        size = -(-sum(full.numels.values()) // world_size)
        at, self._slices = 0, []
        for name, numel in full.numels.items():
            start, stop = max(0, rank * size - at), min(numel, (rank + 1) * size - at)
            if start < stop:
                self._slices.append(TensorSlice(name, start, stop))
            at += numel

    def slices(self) -> list[TensorSlice]:
        return self._slices

    def read(self, piece: TensorSlice, kind: str) -> Tensor:
        assert any(s.name == piece.name and s.start <= piece.start <= piece.stop <= s.stop for s in self._slices)
        return self.full.read(piece, kind)


def save(folder: Path, step: int, state: Any = None, exchange: Exchange | None = None, **options: Any) -> Path | None:
    """Save on this rank and wait; the published path on rank 0."""
    keep, always = options.pop("keep", 100), options.pop("always", False)
    extra = options.pop("extra", {"samples": step})
    writer = CheckpointWriter(folder, exchange or OneRank(), identity=IDENTITY, keep=keep, patience=20, **options)
    writer.save(step, state or random_state(step), PARAMETERS, extra=extra, keep=always)
    assert writer.wait(), writer.reports()
    return writer.reports()[0].path


def stored(path: Path) -> FullState:
    """All that a checkpoint holds, as a dictionary."""
    reader = CheckpointReader(path)
    state = FullState({name: info.numel for name, info in reader.parameters.items()})
    for piece in reader.slices():
        for kind in KINDS:
            state.write(piece, kind, reader.read(piece, kind))
    return state


def equal(a: FullState, b: FullState) -> bool:
    """Whether two states have the same names and, to the bit, the same values."""
    return a.numels == b.numels and all(
        torch.equal(a.tensors[kind][name].view(torch.int32), b.tensors[kind][name].view(torch.int32))
        for kind in KINDS
        for name in a.numels
    )
