"""The shapes that the offline compilation covers: BERT's, in bf16, with every feature that changes a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ds_stacking.kernels._launch import Launch, recording
from ds_stacking.kernels.add_layer_norm import add_layer_norm


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _seed() -> torch.Tensor:
    return _tensor(1, dtype=torch.int64, grad=False)


def _backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _norm(width: int, dropout: float, prenorm: bool) -> None:
    x, residual = _tensor(4096, width), _tensor(4096, width)
    weight, shift, bias = (_tensor(width) for _ in range(3))
    out = add_layer_norm(
        x, weight, shift, residual=residual, bias=bias, dropout=dropout, seed=_seed(), return_sum=prenorm
    )
    _backward(*(out if prenorm else (out,)))


CASES: dict[str, Callable[[], None]] = {
    "add_layer_norm/768": lambda: _norm(768, 0.0, False),
    "add_layer_norm/768-dropout": lambda: _norm(768, 0.1, False),
    "add_layer_norm/1024-prenorm-dropout": lambda: _norm(1024, 0.1, True),
}
"""Operators called forward and backward on meta tensors, by name."""


def recorded_cases() -> dict[str, list[Launch]]:
    """The launches of every case."""
    found = {}
    for name, run in CASES.items():
        with recording() as launches:
            run()
        found[name] = launches
    return found
