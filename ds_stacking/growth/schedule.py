"""Which elements move from which rank to which, without asking each other: every rank finds its own moves.

A *move* carries elements start..stop of one target tensor from a rank that holds its source to a rank that wants it.
Both compute it alike from what all ranks hold and want. Elements that a rank holds it takes from itself, others from
the lowest rank that holds them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ds_stacking.growth.checks import check_source, check_target
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.holdings import Holdings, holdings
from ds_stacking.growth.plan import GrowthPlan, PlanEntry
from ds_stacking.growth.state import TensorSlice

ROUND = 2 << 20
"""Most elements of a kind that a rank sends or receives at one time; larger buffers would be mapped anew each time."""


class Move(NamedTuple):
    """Elements on their way from `src_rank` to `dst_rank`."""

    entry: PlanEntry
    start: int
    stop: int
    src_rank: int
    dst_rank: int

    @property
    def crosses(self) -> bool:
        """Whether they leave their rank."""
        return self.src_rank != self.dst_rank

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def source(self) -> TensorSlice:
        """Where they come from."""
        assert self.entry.source is not None
        return TensorSlice(self.entry.source, self.start, self.stop)

    @property
    def target(self) -> TensorSlice:
        """Where they go."""
        return TensorSlice(self.entry.target, self.start, self.stop)


def schedule(
    plan: GrowthPlan, held: Sequence[TensorSlice], wanted: Sequence[TensorSlice], exchange: Exchange
) -> list[Move]:
    """The moves from and to this rank, given what it holds of the source and wants of the target, in the plan's order.

    Raises UserError, on every rank, where the plan does not fit the source or the target.
    """
    sources = holdings(held, dict.fromkeys(e.source for e in plan.entries if e.source is not None), exchange)
    check_source(plan, sources)
    targets = holdings(wanted, [entry.target for entry in plan.entries], exchange)
    check_target(plan, targets)
    order = {entry.target: number for number, entry in enumerate(plan.entries)}
    moves = [*_arriving(plan, held, wanted, sources, exchange.rank)]
    moves += _leaving(plan, held, sources, _unmet(plan, sources, targets), exchange.rank)
    return sorted(moves, key=lambda move: (order[move.entry.target], move.start))


def rounds(moves: Iterable[Move], limit: int, exchange: Exchange) -> list[list[Move]]:
    """Share the crossing `moves` of this rank out among rounds that all ranks make together. Collective.

    Of what a rank sends to another, every round carries an equal part. So in no round does any rank send or receive
    more than `limit` elements, give or take one for every rank that it exchanges with.
    """
    streams: dict[tuple[int, int], list[Move]] = {}
    load = torch.zeros(exchange.world_size, 2, dtype=torch.int64)  # (sent, received)
    for move in moves:
        streams.setdefault((move.src_rank, move.dst_rank), []).append(move)
        load[exchange.rank, int(move.dst_rank == exchange.rank)] += move.numel
    count = -(-int(exchange.all_reduce_tensor(load).max()) // limit)
    result: list[list[Move]] = [[] for _ in range(count)]
    for stream in streams.values():
        for number, part in _equal_parts(stream, count):
            result[number].append(part)
    return result


def round_limit(plan: GrowthPlan) -> int:
    """Elements of a kind that a rank may send or receive in a round: ROUND, or one grown block if that is less."""
    sizes = [0] * plan.to_layers
    for entry in plan.entries:
        if entry.block is not None:
            sizes[entry.block] += entry.info.numel
    return min(max(sizes) or ROUND, ROUND)


def _arriving(
    plan: GrowthPlan, held: Iterable[TensorSlice], wanted: Iterable[TensorSlice], sources: Holdings, rank: int
) -> Iterator[Move]:
    """The moves to this rank, from itself or others."""
    entries = {entry.target: entry for entry in plan.entries if entry.source is not None}
    own: dict[str, list[TensorSlice]] = {}
    for piece in held:
        own.setdefault(piece.name, []).append(piece)
    for want in wanted:
        entry = entries.get(want.name)
        if entry is None or entry.source is None or not want.numel:
            continue
        if any(have.start <= want.start and want.stop <= have.stop for have in own.get(entry.source, ())):
            yield Move(entry, want.start, want.stop, rank, rank)
        else:
            for start, stop, src_rank in _source_ranks(sources, entry.source, want.start, want.stop, rank):
                yield Move(entry, start, stop, src_rank, rank)


def _leaving(
    plan: GrowthPlan, held: Iterable[TensorSlice], sources: Holdings, unmet: Holdings, rank: int
) -> Iterator[Move]:
    """The moves from this rank to others."""
    for have in held:
        if have.name not in unmet.numbers:
            continue
        for _, first, last, dst_rank, number in unmet.overlapping(have.name, have.start, have.stop).tolist():
            if dst_rank != rank:
                start, stop = max(first, have.start), min(last, have.stop)
                for begin, end, src_rank in _source_ranks(sources, have.name, start, stop, dst_rank):
                    if src_rank == rank:
                        yield Move(plan.entries[number], begin, end, rank, dst_rank)


def _unmet(plan: GrowthPlan, sources: Holdings, targets: Holdings) -> Holdings:
    """What ranks want and do not hold whole themselves, as slices of the source, each with its entry's number.

    Mostly this is little, however many slices there are: where source and target are cut alike, nothing.
    """
    source_of = torch.tensor([-1 if e.source is None else sources.numbers[e.source] for e in plan.entries])
    wants: Tensor = torch.cat([targets.rows, targets.rows[:, :1]], 1)
    wants[:, 0] = source_of[wants[:, 0]]
    wants = wants[wants[:, 0] >= 0]
    return Holdings(sources.names, wants[~sources.covers(wants)])


def _source_ranks(
    sources: Holdings, name: str, start: int, stop: int, dst_rank: int
) -> Iterator[tuple[int, int, int]]:
    """Cut elements start..stop of a source at every holder's bounds: (start, stop, src_rank) of each part.

    A sweep over the holders in the order in which they begin; those that have begun wait in a heap, the best first.
    """
    holders = sources.overlapping(name, start, stop).tolist()
    bounds = (min(max(bound, start), stop) for holder in holders for bound in holder[1:3])
    begun: list[tuple[bool, int, int]] = []  # (another rank than the dst_rank, rank, its last element's successor)
    position = 0
    for begin, end in pairwise(sorted({start, stop, *bounds})):
        while position < len(holders) and holders[position][1] <= begin:
            _, _, last, rank, *_ = holders[position]
            heapq.heappush(begun, (rank != dst_rank, rank, last))
            position += 1
        while begun and begun[0][2] <= begin:
            heapq.heappop(begun)
        assert begun, f"no rank holds elements {begin} to {end} of {name}"
        yield begin, end, begun[0][1]


def _equal_parts(stream: Sequence[Move], count: int) -> Iterator[tuple[int, Move]]:
    """Cut the elements of `stream`, one after another, into `count` parts: each cut move with its part's number."""
    total, done, number = sum(move.numel for move in stream), 0, 0
    for move in stream:
        start = move.start
        while start < move.stop:
            end = total * (number + 1) // count
            stop = min(move.stop, start + end - done)
            if start < stop:
                yield number, move._replace(start=start, stop=stop)
            done, start = done + stop - start, stop
            number += done == end
