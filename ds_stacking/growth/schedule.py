"""Which elements move from which rank to which: the same list on every rank, without asking each other.

A *move* carries elements start..stop of one target tensor from a rank that holds its source to a rank that wants it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ds_stacking.growth.checks import check_source, check_target
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.plan import GrowthPlan, PlanEntry
from ds_stacking.growth.state import TensorSlice


class Move(NamedTuple):
    """Elements on their way from `owner` to `wanter`."""

    entry: PlanEntry
    start: int
    stop: int
    owner: int
    wanter: int

    @property
    def crosses(self) -> bool:
        """Whether they leave their rank."""
        return self.owner != self.wanter

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
    """All moves of all ranks, given what this rank holds of the source and wants of the target.

    Raises UserError, on every rank, where the plan does not fit the source or the target.
    """
    held_by_name = holdings(held, dict.fromkeys(e.source for e in plan.entries if e.source is not None), exchange)
    check_source(plan, held_by_name)
    wanted_by_name = holdings(wanted, [entry.target for entry in plan.entries], exchange)
    check_target(plan, wanted_by_name)
    return [
        move
        for entry in plan.entries
        if entry.source is not None
        for move in _cover(entry, held_by_name[entry.source], wanted_by_name[entry.target])
    ]


def holdings(
    pieces: Iterable[TensorSlice], names: Iterable[str], exchange: Exchange
) -> dict[str, list[tuple[int, TensorSlice]]]:
    """The slices that all ranks hold of the tensors `names`, by name, each with its rank. Collective."""
    names = list(names)
    known = set(names)
    result: dict[str, list[tuple[int, TensorSlice]]] = {}
    for rank, table in enumerate(exchange.tables([piece for piece in pieces if piece.name in known], names)):
        for piece in table:
            if piece.numel:
                result.setdefault(piece.name, []).append((rank, piece))
    return result


def rounds(moves: Iterable[Move], limit: int) -> Iterator[list[Move]]:
    """Cut `moves` where the elements that cross ranks reach `limit`; a move larger than what is left is split."""
    current: list[Move] = []
    room = limit
    for move in moves:
        while move.crosses and move.numel > room:
            current.append(move._replace(stop=move.start + room))
            move = move._replace(start=move.start + room)
            yield current
            current, room = [], limit
        current.append(move)
        room -= move.numel if move.crosses else 0
        if room == 0:
            yield current
            current, room = [], limit
    if current:
        yield current


def largest_block(plan: GrowthPlan) -> int:
    """Elements of one block of the grown model: what a round may carry."""
    sizes = [0] * plan.to_layers
    for entry in plan.entries:
        if entry.block is not None:
            sizes[entry.block] += entry.info.numel
    return max(sizes)


def _cover(
    entry: PlanEntry, held: list[tuple[int, TensorSlice]], wanted: list[tuple[int, TensorSlice]]
) -> Iterator[Move]:
    """Cover every wanted slice, from the wanter's own holdings where it can."""
    for wanter, want in wanted:
        at = want.start
        while at < want.stop:
            owner, have = min(
                ((rank, piece) for rank, piece in held if piece.start <= at < piece.stop),
                key=lambda item: (item[0] != wanter, item[0]),
            )
            stop = min(have.stop, want.stop)
            yield Move(entry, at, stop, owner, wanter)
            at = stop
