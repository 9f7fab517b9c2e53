"""One result with two readers, whose two gradients reach the operator that made it apart and are added there.

Autograd would add them by a kernel of its own: 3 rows read or written for each row, where the operator's backward
kernel reads one row more. An operator may not return one tensor twice, so it returns beside y another tensor of y's
shape without elements of its own, and a function without a kernel ties the second reader's gradient to that.
"""

from __future__ import annotations

from typing import Any

import torch


def second_reader(y: torch.Tensor) -> torch.Tensor:
    """What an operator returns beside y [T, N] for `read_twice`: y's shape on the memory of one element."""
    return y.new_empty(1).expand(y.shape)


def read_twice(y: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y for each reader, on the same memory; the gradient of the other one goes to `second`."""
    return _ReadTwice.apply(y, second)


class _ReadTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_compiling():  # which knows no such call
            ctx.set_materialize_grads(False)
        return y.view_as(y), y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return gradients
