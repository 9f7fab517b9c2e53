"""The gradients of one parameter group as one flat tensor: summed over micro-batches, their norm, their clipping.

A launch per tensor costs the host some 10 us, and a model has hundreds of tensors; so gradients are laid one after
another as soon as a backward pass has made them, and everything after that is one launch per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.distributed import ProcessGroup

ROW = 1024
"""Squares that are summed in fp32; the sums of such rows are added in fp64. So the norm of 10^9 elements is as exact
as its rounding to fp32, and nothing of their size is cast."""


class GradientSums:
    """Takes the gradients of a group's parameters after every backward pass and sums them."""

    def __init__(self, parameters: Sequence[Tensor], *, sums: torch.dtype, padding: Sequence[int], numel: int) -> None:
        """`padding` has the zeros behind each parameter in the flat tensor, whose elements are `numel` with a tail.

        `sums` is the type in which micro-batches are summed.
        """
        self.parameters, self.dtype = parameters, sums
        self._zeros = [parameter.new_zeros(number) for parameter, number in zip(parameters, padding, strict=True)]
        self._tail = parameters[0].new_zeros(numel - sum(padding) - sum(parameter.numel() for parameter in parameters))
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients that the parameters have, and free them. A parameter without one counts as zeros.

        One step holds them twice for a moment, at the end of a backward pass, when its activations are gone.
        """
        pieces: list[Tensor] = []
        for parameter, zeros in zip(self.parameters, self._zeros, strict=True):
            pieces += [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, zeros]
            parameter.grad = None
        flat = torch._utils._flatten_dense_tensors([piece for piece in (*pieces, self._tail) if piece.numel()])
        if self._sum is None:
            self._sum = flat
        else:
            self._sum = self._sum.to(self.dtype).add_(flat)

    def forget(self) -> None:
        """Drop the sum and the gradients that the parameters have."""
        self._sum = None
        for parameter in self.parameters:
            parameter.grad = None

    def take(self) -> Tensor:
        """The sum, [numel], in the parameters' type, rounded once; it is forgotten here."""
        if self._sum is None or any(parameter.grad is not None for parameter in self.parameters):
            self.add()
        assert self._sum is not None
        flat, self._sum = self._sum.to(self.parameters[0].dtype), None
        return flat


def give(parameters: Sequence[Tensor], flat: Tensor | None) -> None:
    """Make the pieces of `flat`, one after another, the gradients of `parameters`; None takes gradients away."""
    pieces = [None] * len(parameters) if flat is None else flat.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = None if piece is None else piece.view_as(parameter)


def average(flat: Tensor, group: ProcessGroup | None, elements: int) -> None:
    """Average over ranks in place, `elements` at a time. Collective."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    flat.div_(ranks)
    for part in flat.split(elements):
        dist.all_reduce(part, group=group)


def global_norm(flats: Sequence[Tensor], *, over_ranks: ProcessGroup | None = None) -> Tensor:
    """The 2-norm of all of them together: [] float32, not finite where one of their elements is not.

    With `over_ranks` each rank holds a part, and the norm is that of the parts together. Collective. It is infinite
    too where squares leave fp32, from norms of 1.8e19 on: nothing can be clipped by such a norm.
    """
    norms = []
    for flat in flats:
        rows = flat[: flat.numel() - flat.numel() % ROW].view(-1, ROW)
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
        norms.append(torch.linalg.vector_norm(flat[rows.numel() :], dim=0, keepdim=True, dtype=torch.float32))
    squares = torch.cat(norms).double().square_().sum()
    if over_ranks is not None:
        dist.all_reduce(squares, group=over_ranks)
    return squares.float().sqrt()


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """What gradients of this norm are multiplied by: [1] float32 on their device; 1 where `clip` is 0."""
    if not clip:
        return norm.new_ones(1)
    return ((norm + 1e-6) / clip).clamp_(min=1.0).reciprocal_().view(1)
