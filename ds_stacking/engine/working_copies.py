"""Whether the weights that the forward pass uses are the masters' own, after something has written the masters.

A growth and a restore verify the masters; a stale 16-bit copy beside right masters would train on old weights until
the next step, and under ZeRO 1 to 3 on some ranks only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.executor import digest


def verify_working_copies(state: LiveState, exchange: Exchange) -> None:
    """Raise RuntimeError, on every rank, where a working copy is not its cast master. Collective.

    Each rank compares what it holds the master of, element by element; of what every rank has a copy of, the ranks
    compare checksums.
    """
    wrong = [name for name, copy, master in _own(state) if not torch.equal(copy, master.to(copy))]
    mine = _checksum(state)
    first = exchange.all_reduce_sum(mine if exchange.rank == 0 else 0)
    apart = exchange.all_reduce_sum(int(mine != first))
    if exchange.all_reduce_sum(len(wrong)) or apart:
        where = ", ".join(wrong[:5]) or "on another rank"
        raise RuntimeError(f"These weights are not those of the optimizer's fp32 masters: {where}.")


def _own(state: LiveState) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, working copy and master of what this rank's optimizer updates, flat."""
    parameters = dict(state.engine.module.named_parameters())
    for piece in state.slices():
        parameter = parameters[piece.name]
        if hasattr(parameter, "ds_tensor"):  # ZeRO 3: the rank's own part and nothing else
            copy = parameter.ds_tensor.detach().view(-1)[: piece.numel]
        else:
            copy = parameter.detach().view(-1)[piece.start : piece.stop]
        yield piece.name, copy, state.read(piece, "master")


def _checksum(state: LiveState) -> int:
    """Of the weights that every rank has whole; under ZeRO 3 those are the small ones that it never partitions."""
    whole = [
        parameter
        for parameter in state.engine.module.parameters()
        if not hasattr(parameter, "ds_tensor") or (parameter.ds_persist and parameter.numel() == parameter.ds_numel)
    ]
    hasher = hashlib.blake2b(digest_size=7)  # a sum over ranks with zeros must not overflow
    for parameter in whole:
        hasher.update(digest(parameter.view(-1)).numpy().tobytes())
    return int.from_bytes(hasher.digest(), "little")
