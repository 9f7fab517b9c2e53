"""What the executor needs of the other ranks: their tables of slices, and tensors sent both ways at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(Protocol):
    """Collective operations; every rank calls them in the same order."""

    rank: int
    world_size: int

    def gather_slices(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, by rank, each behind its rank's number: [n, C] int64 -> [N, 1 + C] on the CPU."""
        ...

    def all_to_all(
        self, send: Sequence[Sequence[Tensor]], receive_sizes: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Send 1-D tensors of `dtype`, on any device, to every rank; receive one of the given size from each.

        What a rank is sent arrives as one tensor, its parts in order.
        """
        ...

    def all_reduce_tensor(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks, element by element, on the CPU."""
        ...

    def all_reduce_sum(self, value: int) -> int:
        """The sum of `value` over ranks."""
        return int(self.all_reduce_tensor(torch.tensor(value)))


class OneRank(Exchange):
    """A process on its own."""

    rank = 0
    world_size = 1

    def gather_slices(self, rows: Tensor) -> Tensor:
        """Its own rows."""
        return with_ranks([rows])

    def all_to_all(
        self, send: Sequence[Sequence[Tensor]], receive_sizes: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """What it sent to itself."""
        return [_joined(send[0], dtype, None)]

    def all_reduce_tensor(self, values: Tensor) -> Tensor:
        """The values."""
        return values


class Ranks(Exchange):
    """The ranks of the default process group, whose backend must be able to carry tensors on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device

    def gather_slices(self, rows: Tensor) -> Tensor:
        """Gathered padded to the longest table."""
        lengths = self._gather(torch.tensor([len(rows)]))[:, 0].tolist()
        padded = rows.new_zeros(max(lengths), rows.shape[1])
        padded[: len(rows)] = rows
        return with_ranks([table[:n] for table, n in zip(self._gather(padded), lengths, strict=True)])

    def all_to_all(
        self, send: Sequence[Sequence[Tensor]], receive_sizes: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """One all-to-all with uneven parts."""
        outgoing = _joined([part for parts in send for part in parts], dtype, self.device)
        incoming = torch.empty(sum(receive_sizes), dtype=dtype, device=self.device)
        sizes = [sum(part.numel() for part in parts) for parts in send]
        dist.all_to_all_single(incoming, outgoing, list(receive_sizes), sizes)
        return list(incoming.split(list(receive_sizes)))

    def all_reduce_tensor(self, values: Tensor) -> Tensor:
        """One all-reduce."""
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values.cpu()

    def _gather(self, tensor: Tensor) -> Tensor:
        """[...] of every rank -> [ranks, ...] on the CPU."""
        tensor = tensor.to(self.device)
        everyone = tensor.new_empty(self.world_size * tensor.numel())
        dist.all_gather_into_tensor(everyone, tensor.flatten())
        return everyone.cpu().view(self.world_size, *tensor.shape)


def with_ranks(tables: Sequence[Tensor]) -> Tensor:
    """Tables of ranks 0, 1, ... one below the other, a column with the rank before the others."""
    ranks = torch.arange(len(tables)).repeat_interleave(torch.tensor([len(table) for table in tables]))
    return torch.cat([ranks[:, None], torch.cat(list(tables))], 1)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """The parts one after another on `device` (None: where they are). CUDA joins nothing with a host tensor."""
    there = [part if device is None else part.to(device) for part in parts]
    if len(there) == 1:
        return there[0]
    return torch.cat(there) if there else torch.empty(0, dtype=dtype, device=device)


def make_exchange(device: torch.device) -> Exchange:
    """The default process group's ranks, or this process alone where there is none."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Ranks(device)
    return OneRank()
