"""Our operators beside torch's formulas for them, which take the kernels' own dropout masks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.catalogue import Function, Machine
from ds_stacking.kernels import (
    add_layer_norm,
    attention,
    attention_padded,
    bias_gelu,
    embedding_norm,
    gather_rows,
    inverse_index,
    linear_cross_entropy,
    linear_gelu,
    look_up,
    scatter_rows,
    selected_attention,
)
from ds_stacking.kernels._dropout import keep_mask


@dataclass(kw_only=True)
class Subject:
    """An operator, torch's formula for it, and the inputs of both; functions return a tensor or several."""

    ours: Function
    formula: Function
    inputs: list[Tensor]


def drop(x: Tensor, seed: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Dropout with the kernels' mask for these rows and columns."""
    return torch.where(keep_mask(seed, rows, columns, p), x / (1 - p), 0.0) if p else x


def _index(x: Tensor, dim: int) -> Tensor:
    return torch.arange(x.shape[dim], device=x.device)


def attend(qkv: Tensor, first: int, causal: bool, seed: Tensor, p: float) -> Tensor:
    """Attention of one sequence, qkv [S, 3, H, D], whose first token is number `first` of the batch: [S, H, D]."""
    q, k, v = qkv.permute(1, 2, 0, 3)  # [H, S, D]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(_index(q, 1) > _index(q, 1)[:, None], -torch.inf)
    rows = (first + _index(q, 1)) * len(q) + _index(q, 0)[:, None]
    probabilities = drop(scores.softmax(-1), seed, rows[..., None], _index(q, 1), p)
    return (probabilities @ v).transpose(0, 1)


def attend_all(qkv: Tensor, bounds: list[int], causal: bool, seed: Tensor, p: float) -> Tensor:
    """Attention of sequences that lie one after the other, [T, H, D]."""
    parts = [attend(qkv[i:j], i, causal, seed, p) for i, j in zip(bounds, bounds[1:], strict=False) if j > i]
    return torch.cat(parts)


def _bounds(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def sequences(at: Machine, lengths: list[int], causal: bool, p: float) -> Subject:
    """Attention of sequences of these lengths, unpadded as in training."""
    seed, bounds = at.seed(), _bounds(lengths)
    starts = torch.tensor(bounds, dtype=torch.int32).to(at.device)
    return Subject(
        ours=lambda qkv: attention(qkv, starts, max(lengths), causal=causal, dropout=p, seed=seed),
        formula=lambda qkv: attend_all(qkv, bounds, causal, seed, p),
        inputs=[at.random(bounds[-1], 3, at.size(12, 2), 64)],
    )


def padded(at: Machine, lengths: list[int], causal: bool, p: float) -> Subject:
    """Attention in rows as long as the longest sequence, zeros on padding."""
    seed, longest = at.seed(), max(lengths)
    ends = torch.tensor(lengths, dtype=torch.int32).to(at.device)

    def formula(qkv):
        first = range(0, len(qkv), longest)
        parts = [attend(qkv[i : i + n], i, causal, seed, p) for i, n in zip(first, lengths, strict=True)]
        return torch.cat([F.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts])

    def ours(qkv):
        batch = qkv.unflatten(0, (len(lengths), longest))
        return attention_padded(batch, ends, causal=causal, dropout=p, seed=seed).flatten(0, 1)

    return Subject(ours=ours, formula=formula, inputs=[at.random(len(lengths) * longest, 3, at.size(12, 2), 64)])


def selected(at: Machine, lengths: list[int], p: float) -> Subject:
    """Attention of some tokens, in any order, as in the last block of every training step."""
    seed, bounds, heads = at.seed(), _bounds(lengths), at.size(12, 2)
    starts = torch.tensor(bounds, dtype=torch.int32).to(at.device)
    chosen = torch.randperm(bounds[-1])[: max(1, round(0.15 * bounds[-1]))].to(at.device)

    def formula(q, kv):
        every = q.new_zeros(len(kv), *q.shape[1:]).index_copy(0, chosen, q)
        return attend_all(torch.cat([every[:, None], kv], dim=1), bounds, False, seed, p)[chosen]

    return Subject(
        ours=lambda q, kv: selected_attention(q, kv, starts, max(lengths), chosen, dropout=p, seed=seed),
        formula=formula, inputs=[at.random(len(chosen), heads, 64), at.random(bounds[-1], 2, heads, 64)],
    )  # fmt: skip


def norm(at: Machine, tokens: int, width: int, p: float, second: str) -> Subject:
    """The residual sum with its norm and, as `second`, the "sum" (pre-LN), "again" the norm (post-LN), or nothing."""
    seed = at.seed()

    def formula(x, residual, bias, weight, shift):
        z = residual + drop(x + bias, seed, _index(x, 0)[:, None], _index(x, 1), p)
        y = F.layer_norm(z, z.shape[-1:], weight, shift, 1e-12)
        return {"sum": (y, z), "again": (y, y)}.get(second, y)

    def ours(x, residual, bias, weight, shift):
        return add_layer_norm(
            x, weight, shift, residual=residual, bias=bias, dropout=p, seed=seed, return_sum=second == "sum",
            twice=second == "again",
        )  # fmt: skip

    vectors = [at.random(width) for _ in range(3)]
    return Subject(ours=ours, formula=formula, inputs=[at.random(tokens, width), at.random(tokens, width), *vectors])


def plain_norm(at: Machine, tokens: int, width: int) -> Subject:
    """LayerNorm alone, as it begins a pre-LN block."""
    return Subject(
        ours=add_layer_norm, formula=lambda x, w, s: F.layer_norm(x, x.shape[-1:], w, s, 1e-12),
        inputs=[at.random(tokens, width), at.random(width), at.random(width)],
    )  # fmt: skip


def gelu(at: Machine, tokens: int, width: int, form: Any) -> Subject:
    """GELU after a bias."""
    return Subject(
        ours=lambda x, b: bias_gelu(x, b, approximate=form), formula=lambda x, b: F.gelu(x + b, approximate=form),
        inputs=[at.random(tokens, width), at.random(width)],
    )  # fmt: skip


def up(at: Machine, tokens: int, width: int) -> Subject:
    """The feed-forward layer's first product with its GELU."""
    return Subject(
        ours=linear_gelu, formula=lambda *a: F.gelu(F.linear(*a)),
        inputs=[at.random(tokens, width), _matrix(at, 4 * width, width), at.random(4 * width)],
    )  # fmt: skip


def _matrix(at: Machine, *shape: int) -> Tensor:
    return (at.random(*shape).detach() * shape[-1] ** -0.5).requires_grad_()


def head(at: Machine, rows: int, width: int, keep: bool, extras: bool = False) -> Subject:
    """The loss of the masked-LM head, in the mean, that keeps its logits or computes them again in slices.

    `extras`: rows to ignore, label smoothing and z-loss.
    """
    vocabulary = at.size(30522, 50)
    target = torch.randint(vocabulary, (rows,), device=at.device)
    if extras:
        target[::7] = -100
    smoothing, z_loss = (0.1, 1e-4) if extras else (0.0, 0.0)

    def formula(h, weight, bias):
        logits = F.linear(h, weight, bias)
        loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
        return (loss + z_loss * (logits.logsumexp(1).square() * (target >= 0)).sum()) / rows

    def ours(h, weight, bias):
        loss = linear_cross_entropy(
            h, weight, bias, target, label_smoothing=smoothing, z_loss=z_loss, keep_logits=keep
        )
        return loss / rows

    inputs = [at.random(rows, width), _matrix(at, vocabulary, width), at.random(vocabulary)]
    return Subject(ours=ours, formula=formula, inputs=inputs)


def embedding(at: Machine, lengths: list[int], width: int, p: float, kinds: bool = False) -> Subject:
    """BERT's embedding layer as training calls it: two readers, places with a period where all lengths are equal."""
    vocabulary, longest, tokens, seed = at.size(30522, 50), max(lengths), sum(lengths), at.seed()
    ids, kind = (torch.randint(n, (tokens,), device=at.device) for n in (vocabulary, 2))
    place = torch.cat([torch.arange(length) for length in lengths]).to(at.device)
    places = place[:longest] if len(set(lengths)) == 1 else place

    def formula(word, position, segment, weight, shift):
        z = word[ids] + position[place] + (segment[kind] if kinds else segment[0])
        y = F.layer_norm(z, z.shape[1:], weight, shift, 1e-12)
        y = drop(y, seed, _index(y, 0)[:, None], _index(y, 1), p)
        return y, y

    def ours(word, position, segment, weight, shift):
        return embedding_norm(
            ids, places, kind if kinds else None, word=word, position=position, segment=segment, weight=weight,
            shift=shift, dropout=p, seed=seed, twice=True,
        )  # fmt: skip

    tables = [at.random(n, width) for n in (vocabulary, longest + 3, 2)]
    return Subject(ours=ours, formula=formula, inputs=[*tables, at.random(width), at.random(width)])


def small_table(at: Machine, tokens: int, width: int) -> Subject:
    """Rows of a small table, as pre-LN looks up positions."""
    rows = at.size(512, 13)
    index = torch.randint(rows, (tokens,), device=at.device)
    return Subject(
        ours=lambda table: look_up(table, index), formula=lambda table: table[index], inputs=[at.random(rows, width)]
    )


def selection(at: Machine, tokens: int, width: int) -> Subject:
    """Rows picked and put back."""
    kept = torch.arange(0, tokens, 3, device=at.device)
    inverse = inverse_index(kept, tokens)
    return Subject(
        ours=lambda x: scatter_rows(gather_rows(x, kept, inverse), kept, inverse, x),
        formula=lambda x: x.index_copy(0, kept, x[kept]), inputs=[at.random(tokens, width)],
    )  # fmt: skip
