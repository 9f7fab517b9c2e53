"""The shapes that the offline compilation covers: BERT's, in bf16, with every feature that changes a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ds_stacking.kernels._launch import Launch, recording
from ds_stacking.kernels.add_layer_norm import add_layer_norm
from ds_stacking.kernels.attention import attention
from ds_stacking.kernels.linear_cross_entropy import linear_cross_entropy


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


def _attention(
    longest: int, size: int = 64, causal: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> None:
    qkv = _tensor(4096, 3, 768 // size, size, dtype=dtype)
    starts = _tensor(4096 // longest + 1, dtype=torch.int32, grad=False)
    _backward(attention(qkv, starts, longest, causal=causal, dropout=dropout, seed=_seed()))


def _cross_entropy(width: int) -> None:
    h, weight, bias = _tensor(4915, width), _tensor(30522, width), _tensor(30522)
    _backward(linear_cross_entropy(h, weight, bias, _tensor(4915, dtype=torch.int64, grad=False)))


CASES: dict[str, Callable[[], None]] = {
    "attention/64-causal-dropout": lambda: _attention(64, causal=True, dropout=0.1),
    "attention/128": lambda: _attention(128),
    "attention/128-causal-dropout": lambda: _attention(128, causal=True, dropout=0.1),
    "attention/512": lambda: _attention(512),
    "attention/512-causal-dropout": lambda: _attention(512, causal=True, dropout=0.1),
    "attention/512-d128": lambda: _attention(512, size=128),
    "attention/512-d128-causal-dropout": lambda: _attention(512, size=128, causal=True, dropout=0.1),
    "attention/512-fp32": lambda: _attention(512, dtype=torch.float32),
    "linear_cross_entropy/768": lambda: _cross_entropy(768),
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
