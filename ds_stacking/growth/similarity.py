"""Norms of blocks and cosines between blocks, of a state that is spread over ranks: do copies part, and when?

Only what decays counts, the matrices: LayerNorm weights stay near 1 and would make all blocks look alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ds_stacking.growth.blocks import BlockNames
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.operators import LayerMap, originals
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, PlanEntry
from ds_stacking.growth.policies import INHERIT
from ds_stacking.growth.schedule import Move, round_limit, rounds, schedule
from ds_stacking.growth.state import KINDS, Kind, StateReader, TensorSlice


def norms(
    pieces: Iterable[TensorSlice],
    read: Callable[[TensorSlice], Tensor],
    labels: Mapping[str, str],
    numels: Mapping[str, int],
    exchange: Exchange,
) -> dict[str, float]:
    """Euclidean norm over all ranks of what `read` gives, by label. Collective.

    `labels` gives the label of every tensor that counts, `numels` its full size; what several ranks hold counts once.
    """
    rows = list(dict.fromkeys(labels.values()))
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)  # [labels, (squares, elements)]
    for piece in pieces:
        if piece.name in labels:
            squares = float(read(piece).double().square().sum())
            sums[rows.index(labels[piece.name])] += torch.tensor([squares, piece.numel], dtype=torch.float64)
    whole = dict.fromkeys(rows, 0)
    for name, label in labels.items():
        whole[label] += numels[name]
    found = exchange.all_reduce_tensor(sums).tolist()
    return {
        row: math.sqrt(squares * whole[row] / elements) for row, (squares, elements) in zip(rows, found, strict=True)
    }


def copies(layers: LayerMap) -> dict[int, int]:
    """For every block of the grown model that is a copy, the block that is its original, both by position there."""
    first = {layers[position]: position for position in originals(layers)}
    return {
        position: first[source]
        for position, source in enumerate(layers)
        if source is not None and first[source] != position
    }


def seams(layers: LayerMap) -> list[int]:
    """Blocks that do not stand on the block which they stood on before the growth: 3 in 0 1 2 | 0 1 2."""
    return [at for at in range(1, len(layers)) if layers[at] is None or layers[at - 1] != (layers[at] or 0) - 1]


def cosines(
    state: StateReader,
    parameters: Mapping[str, ParameterInfo],
    blocks: BlockNames,
    pairs: Mapping[int, int],
    exchange: Exchange,
    *,
    kinds: Sequence[Kind] = KINDS,
) -> dict[Kind, dict[int, float | None]]:
    """Cosine between every block of `pairs` and its partner, for each kind; None where one of the two is zero.

    Collective. Of each pair, what lies on different ranks crosses once, in rounds of one block's elements.
    """
    return _Comparison(state, _pairing(parameters, blocks, pairs), exchange, kinds).run(pairs)


def _pairing(parameters: Mapping[str, ParameterInfo], blocks: BlockNames, pairs: Mapping[int, int]) -> GrowthPlan:
    """The plan that would bring every partner's tensors to where its block's lie."""
    entries = []
    for name, info in parameters.items():
        parts = blocks.split(name)
        if parts and parts[0] in pairs and info.decay:
            source = blocks.join(pairs[parts[0]], parts[1])
            entries.append(PlanEntry(target=name, source=source, info=info, state=INHERIT, block=parts[0]))
    return GrowthPlan(
        from_layers=blocks.count,
        to_layers=blocks.count,
        operator="compare",
        optimizer_state="stack",
        layers=tuple(pairs.get(block, block) for block in range(blocks.count)),
        entries=tuple(entries),
    )


class _Comparison:
    def __init__(self, state: StateReader, plan: GrowthPlan, exchange: Exchange, kinds: Sequence[Kind]) -> None:
        self.state, self.plan, self.exchange, self.kinds = state, plan, exchange, kinds
        # [blocks, kinds, (product, square of the block, square of its partner)]
        self.sums = torch.zeros(plan.to_layers, len(kinds), 3, dtype=torch.float64)

    def run(self, pairs: Mapping[int, int]) -> dict[Kind, dict[int, float | None]]:
        held = self.state.slices()
        moves = schedule(self.plan, held, held, self.exchange)
        for move in moves:
            if move.src_rank == move.dst_rank == self.exchange.rank:
                for index, kind in enumerate(self.kinds):
                    self._add(move, index, self.state.read(move.source, kind))
        crossing = [move for move in moves if move.crosses]
        for carried in rounds(crossing, round_limit(self.plan), self.exchange):
            self._exchange_round(carried)
        sums = self.exchange.all_reduce_tensor(self.sums)
        return {kind: {block: _cosine(sums[block, i]) for block in pairs} for i, kind in enumerate(self.kinds)}

    def _exchange_round(self, moves: list[Move]) -> None:
        """One round: send what others compare with, compare with what they sent."""
        rank, world = self.exchange.rank, self.exchange.world_size
        outgoing: list[list[Tensor]] = [[] for _ in range(world)]
        for move in moves:
            if move.src_rank == rank:
                outgoing[move.dst_rank] += [self.state.read(move.source, kind) for kind in self.kinds]
        mine = [move for move in moves if move.dst_rank == rank]
        sizes = [
            len(self.kinds) * sum(move.numel for move in mine if move.src_rank == src_rank)
            for src_rank in range(world)
        ]
        incoming = self.exchange.all_to_all(outgoing, sizes)
        parts = {src_rank: iter(self._split(mine, src_rank, incoming[src_rank])) for src_rank in range(world)}
        for move in mine:
            for index in range(len(self.kinds)):
                self._add(move, index, next(parts[move.src_rank]))

    def _split(self, moves: list[Move], src_rank: int, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([move.numel for move in moves if move.src_rank == src_rank for _ in self.kinds])

    def _add(self, move: Move, index: int, partner: Tensor) -> None:
        own = self.state.read(move.target, self.kinds[index]).double()
        partner = partner.to(own.device).double()
        products = torch.stack([own @ partner, own @ own, partner @ partner])
        self.sums[move.entry.block, index] += products.cpu()


def _cosine(sums: Tensor) -> float | None:
    product, own, partner = sums.tolist()
    return product / math.sqrt(own * partner) if own and partner else None
