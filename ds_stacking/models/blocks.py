"""The Transformer block: self-attention and a feed-forward layer, with LayerNorm before or after each.

With `fused` what surrounds the matrix products runs in the kernels of `ds_stacking.kernels`; parameters and results
are the same.

Shapes: B rows of T tokens, N = B*T, S sequences in them, D hidden size, H heads, E = D/H, R selected ones of the N
tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_stacking.config import ModelConfig
from ds_stacking.models.ops import Dropout, attention, kernels, linear, selected_attention


class Sequences(NamedTuple):
    """Which tokens see each other: those of one sequence."""

    mask: Tensor | None
    """bool, broadcast to [B, 1, T, T], true where a token (third axis) may attend to another; None: to all of its row.
    Not looked at where there is `cu_seqlens`."""
    cu_seqlens: Tensor | None
    """For the fused kernel: bounds of the sequences among the N tokens, from 0 to N, int32 [S + 1]; else None."""
    longest: int
    """No sequence is longer."""


class Rows(NamedTuple):
    """Tokens that are computed where not all are."""

    indices: Tensor
    """Flat indices into the N tokens, without repeats, int64 [R]."""
    inverse: Tensor | None
    """For the fused kernel: the place of every token in `indices`, -1 where it has none, int64 [N]."""


class Linear(nn.Linear):
    """Linear layer with weights drawn from N(0, std^2) and zero bias; with `std=None` both are left unfilled."""

    def __init__(self, in_features: int, out_features: int, std: float | None) -> None:
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, *, outputs: tuple[int, int] | None = None, biased: bool = True) -> Tensor:
        """[..., K] -> [..., N], or `outputs` (first, number) of the N; without the bias where a kernel adds it."""
        if not biased:
            return F.linear(x, self.weight)
        if outputs is None:
            return linear(x, self.weight, self.bias)
        return linear(x, self.weight.narrow(0, *outputs), self.bias.narrow(0, *outputs))


class Embedding(nn.Embedding):
    """Embedding table with rows drawn from N(0, std^2); with `std=None` it is left unfilled."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float | None) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream, and in the fused kernel the sum before it."""

    def __init__(self, config: ModelConfig, fused: bool) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if self.fused:
            return cast(Tensor, kernels().add_layer_norm(x, self.weight, self.bias, eps=self.eps))
        return super().forward(x)

    def join(self, x: Tensor, residual: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Return LayerNorm(z) and z = residual + dropout(x + bias), all [..., D]; fused only."""
        y = kernels().add_layer_norm(
            x, self.weight, self.bias, residual=residual, bias=bias, dropout=p, eps=self.eps, return_sum=True
        )
        return cast(tuple[Tensor, Tensor], y)


def activation(x: Tensor, name: str) -> Tensor:
    """Apply ModelConfig.activation: exact GELU (`gelu`) or its tanh approximation (`gelu_tanh`)."""
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def select_rows(x: Tensor, rows: Rows | None) -> Tensor:
    """Return the selected tokens of x [B, T, D] as [R, D], or x itself where `rows` is None."""
    if rows is None:
        return x
    if rows.inverse is not None:
        return kernels().gather_rows(x.flatten(0, 1), rows.indices, rows.inverse)
    return x.flatten(0, 1).index_select(0, rows.indices)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention.

    Query, key and value are one parameter `qkv.weight` [3*D, D], ordered (q, k, v) x head x head size, so that the
    projection of a batch is a view [N, 3, H, E] without a copy.
    """

    def __init__(self, config: ModelConfig, std: float | None, fused: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.fused = fused
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, std)
        self.out = Linear(config.hidden_size, config.hidden_size, std)

    def forward(self, x: Tensor, sequences: Sequences, rows: Rows | None) -> Tensor:
        """[B, T, D] -> [B, T, D], or [R, D] with `rows`; fused without the bias of `out`."""
        p = self.dropout if self.training else 0.0
        if rows is not None and x.is_cpu and not self.fused and not torch.compiler.is_compiling():
            return self.out(self._selected(x, sequences.mask, rows.indices, p))
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, E]
        if sequences.cu_seqlens is not None:
            tokens = packed.flatten(0, 1)
            context = kernels().attention(tokens, sequences.cu_seqlens, sequences.longest, dropout=p)  # [N, H, E]
            context = context.view_as(x)
        else:
            query, key, value = packed.permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, E]
            context = attention(query, key, value, sequences.mask, p).transpose(1, 2).flatten(2)  # [B, T, D]
        return self.out(select_rows(context, rows), biased=not self.fused)

    def _selected(self, x: Tensor, mask: Tensor | None, rows: Tensor, p: float) -> Tensor:  # -> [R, D]
        """The context of the tokens `rows` alone: only keys and values are computed for the others."""
        width = x.shape[-1]
        query = self.qkv(x.flatten(0, 1).index_select(0, rows), outputs=(0, width))  # [R, D]
        packed = self.qkv(x, outputs=(width, 2 * width)).unflatten(-1, (2, self.num_heads, -1))
        key, value = packed.permute(2, 0, 3, 1, 4)  # 2 x [B, H, T, E]
        return selected_attention(query.unflatten(1, (self.num_heads, -1)), key, value, mask, rows, p).flatten(1)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig, std: float | None, fused: bool) -> None:
        super().__init__()
        self.activation = config.activation
        self.fused = fused
        self.up = Linear(config.hidden_size, config.intermediate_size, std)
        self.down = Linear(config.intermediate_size, config.hidden_size, std)

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:  # [..., D] -> [..., D]
        if not self.fused:
            return self.down(activation(self.up(x), self.activation))
        form: Literal["tanh", "none"] = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down(kernels().bias_gelu(self.up(x, biased=False), self.up.bias, approximate=form), biased=biased)


class Block(nn.Module):
    """One Transformer layer: post-LN (Devlin et al. 2019) or pre-LN (Shoeybi et al. 2019, section 5.3, figure 7).

    Every block of a model has the same parameter names and shapes, so any block can be copied onto any other.
    """

    def __init__(self, config: ModelConfig, std: float | None, fused: bool = False) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.fused = fused
        self.attention = Attention(config, std, fused)
        self.attention_norm = LayerNorm(config, fused)
        self.feed_forward = FeedForward(config, std, fused)
        self.feed_forward_norm = LayerNorm(config, fused)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, sequences: Sequences, rows: Rows | None = None) -> Tensor:
        """Transform x [B, T, D] to [B, T, D].

        With `rows` only these tokens are computed beyond keys and values, and the result is [R, D]: all that a
        model's last block owes to heads that read some positions only.
        """
        if self.fused:
            return self._fused(x, sequences, rows)
        if self.pre_norm:
            x = select_rows(x, rows) + self.dropout(self.attention(self.attention_norm(x), sequences, rows))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(select_rows(x, rows) + self.dropout(self.attention(x, sequences, rows)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))

    def _fused(self, x: Tensor, sequences: Sequences, rows: Rows | None) -> Tensor:
        """`forward` with each residual sum inside the LayerNorm that follows it in this block."""
        p = self.dropout.probability if self.training else 0.0
        # ZeRO-3 frees a module's parameters when it has run: a bias is read after that, which gathers it again.
        if self.pre_norm:
            y = self.attention(self.attention_norm(x), sequences, rows)
            y, x = self.feed_forward_norm.join(y, select_rows(x, rows), self.attention.out.bias, p)
            return x + self.dropout(self.feed_forward(y))
        y = self.attention(x, sequences, rows)
        x, _ = self.attention_norm.join(y, select_rows(x, rows), self.attention.out.bias, p)
        y = self.feed_forward(x, biased=False)
        return self.feed_forward_norm.join(y, x, self.feed_forward.down.bias, p)[0]
