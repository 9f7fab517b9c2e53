"""The launches that the offline compilation covers: BERT's shapes, with every feature that changes a kernel.

On other targets than Hopper, the one tuned for, only the variant with most features is compiled: it needs most
registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_stacking.kernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    embedding_norm,
    gather_rows,
    linear_cross_entropy,
    linear_gelu,
    selected_attention,
)
from ds_stacking.kernels._launch import TARGETS, Launch, recording
from ds_stacking.kernels.fp8_cast import cast_fp8

HOPPER = ("sm_90",)
TOKENS, PREDICTED = 32_768, 4_915
"""Of a micro-batch."""
FP8 = ("sm_90", "sm_100")
"""Targets that have the two 8-bit formats."""


@dataclass(kw_only=True)
class Case:
    """An operator called forward and backward on meta tensors."""

    run: Callable[[], None]
    targets: tuple[str, ...] = TARGETS

    def launches(self) -> list[Launch]:
        """What it launches."""
        with recording() as launches:
            self.run()
        return launches


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _index(*shape: int) -> torch.Tensor:
    return _tensor(*shape, dtype=torch.int64)


def _backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _attention(
    longest: int, size: int = 64, causal: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> None:
    qkv = _tensor(TOKENS, 3, 768 // size, size, dtype=dtype)
    starts = _tensor(TOKENS // longest + 1, dtype=torch.int32)
    bias = _tensor(3 * 768, dtype=dtype) if dropout else None  # training asks for its gradient
    _backward(attention(qkv, starts, longest, causal=causal, dropout=dropout, seed=_index(1), bias=bias))


def _selected_attention(longest: int, dropout: float) -> None:
    q, kv, starts = (
        _tensor(PREDICTED, 12, 64),
        _tensor(TOKENS, 2, 12, 64),
        _tensor(TOKENS // longest + 1, dtype=torch.int32),
    )
    _backward(selected_attention(q, kv, starts, longest, _index(PREDICTED), dropout=dropout, seed=_index(1)))


def _norm(width: int, dropout: float, prenorm: bool) -> None:
    x, residual = _tensor(TOKENS, width), _tensor(TOKENS, width)
    weight, shift, bias = (_tensor(width) for _ in range(3))
    _backward(
        *add_layer_norm(
            x, weight, shift, residual=residual, bias=bias, dropout=dropout, seed=_index(1), return_sum=prenorm,
            twice=not prenorm,
        )
    )  # fmt: skip


def _cross_entropy(keep: bool) -> None:
    h, weight, bias = _tensor(PREDICTED, 768), _tensor(30522, 768), _tensor(30522)
    _backward(linear_cross_entropy(h, weight, bias, _index(PREDICTED), keep_logits=keep))


def _gelu() -> None:
    _backward(bias_gelu(_tensor(TOKENS, 3072), _tensor(3072)))


def _linear_gelu() -> None:
    linear_gelu(_tensor(TOKENS, 768), _tensor(3072, 768), _tensor(3072))


def _embedding(documents: bool) -> None:
    tables = {"word": _tensor(30522, 768), "position": _tensor(512, 768), "segment": _tensor(2, 768)}
    norm: dict[str, Any] = {"weight": _tensor(768), "shift": _tensor(768), "dropout": 0.1, "seed": _index(1)}
    places, kinds = (_index(TOKENS), _index(TOKENS)) if documents else (_index(512), None)
    _backward(*embedding_norm(_index(TOKENS), places, kinds, twice=True, **tables | norm))


def _fp8(dtype: torch.dtype, straight: bool, turned: bool) -> None:
    cast_fp8(_tensor(TOKENS, 1024), _tensor(dtype=torch.float32), dtype, straight=straight, turned=turned)


def _gather() -> None:
    _backward(gather_rows(_tensor(TOKENS, 768), _index(PREDICTED), _index(TOKENS)))


CASES = {
    "attention/16-dropout": Case(run=lambda: _attention(16, dropout=0.1), targets=HOPPER),
    "attention/32-dropout": Case(run=lambda: _attention(32, dropout=0.1), targets=HOPPER),
    "attention/64-dropout": Case(run=lambda: _attention(64, dropout=0.1), targets=HOPPER),
    "attention/64-causal-dropout": Case(run=lambda: _attention(64, causal=True, dropout=0.1)),
    "attention/128": Case(run=lambda: _attention(128), targets=HOPPER),
    "attention/128-dropout": Case(run=lambda: _attention(128, dropout=0.1), targets=HOPPER),
    "attention/128-causal-dropout": Case(run=lambda: _attention(128, causal=True, dropout=0.1), targets=HOPPER),
    "attention/512": Case(run=lambda: _attention(512), targets=HOPPER),
    "attention/512-dropout": Case(run=lambda: _attention(512, dropout=0.1), targets=HOPPER),
    "attention/512-causal-dropout": Case(run=lambda: _attention(512, causal=True, dropout=0.1), targets=HOPPER),
    # beyond 1,024 tokens the backward pass is in two kernels on Hopper too
    "attention/2048": Case(run=lambda: _attention(2048), targets=HOPPER),
    "attention/2048-dropout": Case(run=lambda: _attention(2048, dropout=0.1), targets=HOPPER),
    "attention/2048-causal-dropout": Case(run=lambda: _attention(2048, causal=True, dropout=0.1)),
    "attention/512-d128-causal-dropout": Case(run=lambda: _attention(512, size=128, causal=True, dropout=0.1)),
    "attention/512-fp32": Case(run=lambda: _attention(512, dtype=torch.float32), targets=HOPPER),
    "selected_attention/128": Case(run=lambda: _selected_attention(128, 0.0), targets=HOPPER),
    "selected_attention/512-dropout": Case(run=lambda: _selected_attention(512, 0.1)),
    "add_layer_norm/768": Case(run=lambda: _norm(768, 0.0, False), targets=HOPPER),
    "add_layer_norm/768-dropout": Case(run=lambda: _norm(768, 0.1, False)),
    "add_layer_norm/1024-prenorm-dropout": Case(run=lambda: _norm(1024, 0.1, True), targets=HOPPER),
    "bias_gelu/3072": Case(run=_gelu),
    "embedding_norm/768-dropout": Case(run=lambda: _embedding(False)),
    "embedding_norm/768-documents-dropout": Case(run=lambda: _embedding(True), targets=HOPPER),
    "fp8_cast/1024-e4m3": Case(run=lambda: _fp8(torch.float8_e4m3fn, True, True), targets=FP8),
    "fp8_cast/1024-e4m3-straight": Case(run=lambda: _fp8(torch.float8_e4m3fn, True, False), targets=HOPPER),
    "fp8_cast/1024-e4m3-turned": Case(run=lambda: _fp8(torch.float8_e4m3fn, False, True), targets=HOPPER),
    "fp8_cast/1024-e5m2": Case(run=lambda: _fp8(torch.float8_e5m2, True, True), targets=FP8),
    "gather_rows/768": Case(run=_gather),
    "linear_cross_entropy/768": Case(run=lambda: _cross_entropy(False)),
    "linear_cross_entropy/768-kept": Case(run=lambda: _cross_entropy(True)),
    "linear_gelu/768": Case(run=_linear_gelu),
}
"""By operator and shape."""
