"""Operations for which PyTorch is slow on a CPU, with another way there. On other devices they are PyTorch's own.

- Dropout: a Bernoulli number costs some 10 ns, sixteen random bits less than 1 ns.
- Attention with dropout: PyTorch falls back to a general form with extra passes over the scores.
- Attention of some queries, as many as each sequence has: on a GPU to count them would wait for the device.
- bf16 products: on a CPU without instructions for them they take 10 times as long as in fp32, or longer.

Shapes: B sequences of T tokens, H heads, E head size, R selected ones of the B*T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CPU_MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Asked at import: a compiler cannot trace the question."""
_STEPS = 1 << 16


def _needs_fp32(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.bfloat16 and not CPU_MULTIPLIES_BF16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [..., K], [N, K], [N] -> [..., N]
    """Compute x @ weight.T + bias in the type of x; where a CPU cannot multiply bf16, rounded once from fp32."""
    if _needs_fp32(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the others by the inverse of what is kept.

    On a CPU the probability is a multiple of 2^-16, the nearest one, and the scale fits it: no bias in the mean.
    """
    if not x.is_cpu or torch.compiler.is_compiling():  # a compiled dropout is fused and draws its bits cheaply
        return F.dropout(x, probability)
    dropped = round(probability * _STEPS)
    # One 64-bit random number holds four 16-bit ones.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _STEPS // 2
    return x * kept.to(x.dtype) * (_STEPS / (_STEPS - dropped))  # in bf16 the scale itself would be rounded


class Dropout(nn.Module):
    """Module around `dropout`, active in training only."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.probability) if self.training and self.probability else x


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    """Scaled dot-product attention [B, H, T, E] with dropout of the attention weights.

    `mask` is None or bool, broadcast to [B, H, T, T], true where a token may be attended to. Softmax is in fp32.
    """
    if _needs_fp32(query):
        return attention(query.float(), key.float(), value.float(), mask, probability).to(query.dtype)
    if not (query.is_cpu and probability):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=probability)
    scores = (query @ key.transpose(-1, -2)).float() * (1 / math.sqrt(query.shape[-1]))  # [B, H, T, T]
    if mask is not None:
        # Not -inf: a sequence of padding only must not turn into NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = dropout(scores.softmax(-1).to(value.dtype), probability)
    return weights @ value


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, indices: Tensor, probability: float
) -> Tensor:
    """Attention of the queries [R, H, E] of the tokens `indices` [R], flat ones into B*T; returns [R, H, E].

    `key` and `value` are [B, H, T, E], `mask` is as for `attention`. Queries are laid out as [B, H, most, E], where
    most is the number of the sequence that has the most.
    """
    batch, _, length, _ = key.shape
    sequence = indices // length
    counts = sequence.bincount(minlength=batch)
    order = sequence.argsort(stable=True)
    place = torch.empty_like(order)  # within its sequence
    place[order] = torch.arange(len(indices)) - (counts.cumsum(0) - counts)[sequence[order]]
    most = int(counts.max())
    source = torch.zeros(batch, most, dtype=torch.int64).index_put((sequence, place), torch.arange(len(indices)))
    queries = query.index_select(0, source.flatten()).unflatten(0, (batch, most))  # [B, most, H, E], the rest repeats
    if mask is not None:
        mask = mask.expand(batch, 1, length, length)[torch.arange(batch)[:, None], 0, indices[source] % length][
            :, None
        ]
    context = attention(queries.transpose(1, 2), key, value, mask, probability)  # [B, H, most, E]
    return context.transpose(1, 2).flatten(0, 1).index_select(0, sequence * most + place)
