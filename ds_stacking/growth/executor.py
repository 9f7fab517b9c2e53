"""The one executor: moves state from a reader to a writer as a plan says, between any two shardings, and verifies it.

What a rank already holds it copies itself; only the rest crosses ranks, once, in rounds in which no rank sends or
receives more than one block's elements.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.plan import GrowthPlan
from ds_stacking.growth.schedule import Move, round_limit, rounds, schedule
from ds_stacking.growth.state import KINDS, Kind, StateReader, StateWriter
from ds_stacking.growth.transforms import Transform


@dataclass(kw_only=True)
class MoveReport:
    """What an execution did; sizes are this rank's."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock by phase: schedule, copy, exchange, commit, verify."""
    bytes_copied: int = 0
    """Copied without leaving the rank."""
    bytes_received: int = 0
    """Received from other ranks."""
    largest_round: int = 0
    """Bytes of the largest round's buffers: the memory that the executor itself took."""
    tensors_verified: int = 0
    """Target tensors that were compared with their source, every element of them on some rank."""


def execute(
    plan: GrowthPlan,
    reader: StateReader,
    writer: StateWriter,
    exchange: Exchange,
    *,
    kinds: Sequence[Kind] = KINDS,
) -> MoveReport:
    """Carry out `plan`; all ranks call it together. A target that is not moved to must hold zero moments already.

    Raises RuntimeError, on every rank, where a target differs from its source after the move.
    """
    return _Execution(plan, reader, writer, exchange, kinds).run()


class _Execution:
    def __init__(
        self, plan: GrowthPlan, reader: StateReader, writer: StateWriter, exchange: Exchange, kinds: Sequence[Kind]
    ) -> None:
        self.plan, self.reader, self.writer, self.exchange, self.kinds = plan, reader, writer, exchange, kinds
        self.report = MoveReport()
        self.sent: list[tuple[Move, Tensor]] = []
        self.received: list[Move] = []

    def run(self) -> MoveReport:
        rank = self.exchange.rank
        with self._clock("schedule"):
            moves = schedule(self.plan, self.reader.slices(), self.writer.slices(), self.exchange)
            own = [move for move in moves if move.src_rank == move.dst_rank == rank]
            crossing = [move for move in moves if move.crosses]
        with self._clock("copy"):
            for move in own:
                self._copy(move)
        with self._clock("exchange"):
            for carried in rounds(crossing, round_limit(self.plan), self.exchange):
                self._exchange_round(carried)
        with self._clock("commit"):
            self.writer.commit({entry.target: entry.info.step for entry in self.plan.entries})
        with self._clock("verify"):
            wrong = self._verify(own)
            if self.exchange.all_reduce_sum(len(wrong)):
                where = ", ".join(wrong[:5]) or "on another rank"
                raise RuntimeError(f"After the move these tensors differ from their source: {where}.")
            self.report.tensors_verified = sum(entry.source is not None for entry in self.plan.entries)
        return self.report

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.report.seconds[phase] = time.perf_counter() - start

    def _moved(self, move: Move) -> list[tuple[Kind, Transform]]:
        """The kinds that are not left at zero in the target, each with what is done to its source."""
        done: dict[Kind, Transform] = {
            "master": move.entry.transform,
            "exp_avg": Transform(scale=move.entry.state.first),
            "exp_avg_sq": Transform(scale=move.entry.state.second),
        }
        return [(kind, done[kind]) for kind in self.kinds if kind == "master" or done[kind].scale != 0]

    def _values(self, move: Move) -> list[tuple[Kind, Tensor]]:
        """What the target must hold, computed from the source."""
        return [
            (kind, transform.apply(self.reader.read(move.source, kind), move.entry.target, move.start))
            for kind, transform in self._moved(move)
        ]

    def _copy(self, move: Move) -> None:
        for kind, values in self._values(move):
            self.writer.write(move.target, kind, values)
            self.report.bytes_copied += 4 * values.numel()

    def _exchange_round(self, moves: list[Move]) -> None:
        """One round: pack what this rank sends, exchange, write what it received."""
        rank, outgoing, sizes = self.exchange.rank, *self._empty_parts()
        for move in moves:
            if move.src_rank == rank:
                values = [part for _, part in self._values(move)]
                outgoing[move.dst_rank] += values
                self.sent.append((move, torch.stack([digest(part) for part in values])))
            elif move.dst_rank == rank:
                sizes[move.src_rank] += len(self._moved(move)) * move.numel
        incoming = self.exchange.all_to_all(outgoing, sizes)
        taken = 4 * (sum(sizes) + sum(part.numel() for parts in outgoing for part in parts))
        self.report.bytes_received += 4 * sum(sizes)
        self.report.largest_round = max(self.report.largest_round, taken)
        position = [0] * self.exchange.world_size
        for move in moves:
            if move.crosses and move.dst_rank == rank:
                self.received.append(move)
                for kind, _ in self._moved(move):
                    start = position[move.src_rank]
                    position[move.src_rank] = start + move.numel
                    self.writer.write(move.target, kind, incoming[move.src_rank][start : start + move.numel])

    def _empty_parts(self) -> tuple[list[list[Tensor]], list[int]]:
        world = self.exchange.world_size
        return [[] for _ in range(world)], [0] * world

    def _verify(self, own: list[Move]) -> list[str]:
        """Names of this rank's targets that, read back, are not what their source says.

        What was copied is compared element by element. What crossed ranks is compared by checksum: the sender took
        its own when it read the source, the receiver takes one of what it finds in the target and returns it.
        """
        wrong = [move.entry.target for move in own if not self._equal(move)]
        wrong += [move.entry.target for move in self.received if not self._zero_elsewhere(move)]
        returning, sizes = self._empty_parts()
        for move in self.received:
            found = [digest(self.writer.read(move.target, kind)) for kind, _ in self._moved(move)]
            returning[move.src_rank].append(torch.stack(found).flatten())
        for move, taken in self.sent:
            sizes[move.dst_rank] += taken.numel()
        if self.exchange.world_size > 1:
            found = self.exchange.all_to_all(returning, sizes, dtype=torch.int64)
            position = [0] * self.exchange.world_size
            for move, taken in self.sent:
                start = position[move.dst_rank]
                position[move.dst_rank] = start + taken.numel()
                if not torch.equal(found[move.dst_rank][start : start + taken.numel()].cpu(), taken.flatten()):
                    wrong.append(move.entry.target)
        return wrong

    def _equal(self, move: Move) -> bool:
        same = all(_same(self.writer.read(move.target, k), v) for k, v in self._values(move))
        return same and self._zero_elsewhere(move)

    def _zero_elsewhere(self, move: Move) -> bool:
        """Whether the kinds that were not moved are zero in the target."""
        moved = {kind for kind, _ in self._moved(move)}
        return not any(self.writer.read(move.target, kind).any() for kind in self.kinds if kind not in moved)


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether all elements are equal; a NaN, as in a run that has diverged, is where one was."""
    wanted = wanted.to(found.device)
    return torch.equal(found, wanted) or bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


def digest(values: Tensor) -> Tensor:
    """A checksum of the bits of `values` ([N], any dtype and device): [2] int64 on the CPU.

    The bytes are taken as 64-bit words, laid out as rows of 1,024 and summed by row and by column, modulo 2**64: a
    changed element changes its row's sum, two that were exchanged change those of their rows or columns. The sums, a
    thousandth of the data, are hashed. So it runs at memory speed on every device.
    """
    values = values.detach().contiguous().view(torch.uint8)
    if values.storage_offset() % 8:
        values = values.clone()  # 64-bit words must be aligned
    full = values.numel() // 8 * 8
    words, odd = values[:full].view(torch.int64), values[full:].to(torch.int64)
    whole = words.numel() // 1024 * 1024
    table = words[:whole].view(-1, 1024)
    sums = torch.cat([table.sum(1), table.sum(0), words[whole:], odd]).cpu()
    hashed = hashlib.blake2b(sums.numpy().tobytes(), digest_size=16).digest()
    return torch.frombuffer(bytearray(hashed), dtype=torch.int64)
