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

    def tables(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, by rank, each behind its rank's number: [n, C] int64 -> [N, 1 + C] on the CPU."""
        ...

    def swap(self, send: Sequence[Tensor], receive_sizes: Sequence[int]) -> list[Tensor]:
        """Send one 1-D tensor to every rank and receive one of the given size from each. dtypes agree."""
        ...

    def total(self, value: int) -> int:
        """The sum of `value` over ranks."""
        ...

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks, element by element, on the CPU."""
        ...


class OneRank:
    """A process on its own."""

    rank = 0
    world_size = 1

    def tables(self, rows: Tensor) -> Tensor:
        """Its own rows."""
        return with_ranks([rows])

    def swap(self, send: Sequence[Tensor], receive_sizes: Sequence[int]) -> list[Tensor]:
        """What it sent to itself."""
        return list(send)

    def total(self, value: int) -> int:
        """The value."""
        return value

    def add_up(self, values: Tensor) -> Tensor:
        """The values."""
        return values


class Ranks:
    """The ranks of the default process group, whose backend must be able to carry tensors on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device

    def tables(self, rows: Tensor) -> Tensor:
        """Gathered padded to the longest table."""
        lengths = self._gather(torch.tensor([len(rows)]))[:, 0].tolist()
        padded = rows.new_zeros(max(lengths), rows.shape[1])
        padded[: len(rows)] = rows
        return with_ranks([table[:n] for table, n in zip(self._gather(padded), lengths, strict=True)])

    def swap(self, send: Sequence[Tensor], receive_sizes: Sequence[int]) -> list[Tensor]:
        """One all-to-all with uneven parts."""
        full = [part for part in send if part.numel()]
        outgoing = (full[0] if len(full) == 1 else torch.cat(list(send))).to(self.device)
        incoming = outgoing.new_empty(sum(receive_sizes))
        dist.all_to_all_single(incoming, outgoing, list(receive_sizes), [part.numel() for part in send])
        return list(incoming.split(list(receive_sizes)))

    def total(self, value: int) -> int:
        """One all-reduce."""
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def add_up(self, values: Tensor) -> Tensor:
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


def make_exchange(device: torch.device) -> Exchange:
    """The default process group's ranks, or this process alone where there is none."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Ranks(device)
    return OneRank()
