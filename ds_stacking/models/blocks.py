"""The Transformer block: self-attention and a feed-forward layer, with LayerNorm before or after each.

models/fused.py has its twin on the kernels of `ds_stacking.kernels`, with the same parameters and results.

Shapes: B sequences of T tokens, N = B*T, S spans in them, D hidden size, H heads, E = D/H, R selected ones of the N
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_stacking.config import ModelConfig
from ds_stacking.models.ops import Dropout, attention, linear, selected_attention


class AttentionSpans(NamedTuple):
    """Which tokens attend to each other: those of one span, which is a sequence or a document within one."""

    mask: Tensor | None
    """bool, broadcast to [B, 1, T, T], true where a token (third axis) may attend to another; None: to all of its
    sequence. Not looked at where there is `cu_seqlens`."""
    cu_seqlens: Tensor | None
    """For the fused kernel: bounds of the spans among the N tokens, from 0 to N, int32 [S + 1]; else None."""
    max_seqlen: int
    """No span is longer."""


class TokenSelection(NamedTuple):
    """Tokens that are computed where not all are."""

    indices: Tensor
    """Flat indices into the N tokens, without repeats, int64 [R]."""
    inverse: Tensor | None
    """For the fused kernel: the place of every token in `indices`, -1 where it has none, int64 [N]."""


class Linear(nn.Linear):
    """Linear layer with weights drawn from N(0, std^2) and zero bias; with `std=None` both are left unfilled."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x, weight, bias) -> x @ weight.T + bias; models/fp8.py puts another in its place."""

    def __init__(self, in_features: int, out_features: int, std: float | None) -> None:
        self.std = std
        super().__init__(in_features, out_features)
        self.product = linear

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        *,
        outputs: tuple[int, int] | None = None,
        biased: bool = True,
        bias_gradient: bool = True,
    ) -> Tensor:
        """[..., K] -> [..., N], or `outputs` (first, number) of the N.

        Without the bias where a kernel adds it, without its gradient where a kernel computes that.
        """
        if outputs is not None:
            return self.product(x, self.weight.narrow(0, *outputs), self.bias.narrow(0, *outputs))
        bias = self.bias if bias_gradient else self.bias.detach()
        return self.product(x, self.weight, bias if biased else None)


class Embedding(nn.Embedding):
    """Embedding table with rows drawn from N(0, std^2); with `std=None` it is left unfilled."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float | None) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)


def activation(x: Tensor, name: str) -> Tensor:
    """Apply ModelConfig.activation: exact GELU (`gelu`) or its tanh approximation (`gelu_tanh`)."""
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def select_tokens(x: Tensor, selection: TokenSelection | None) -> Tensor:
    """Return the selected tokens of x [B, T, D] as [R, D], or x itself where there is no selection."""
    return x if selection is None else x.flatten(0, 1).index_select(0, selection.indices)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention.

    Query, key and value are one parameter `qkv.weight` [3*D, D], ordered (q, k, v) x head x head size, so that the
    projection of a batch is a view [N, 3, H, E] without a copy.
    """

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, std)
        self.out = Linear(config.hidden_size, config.hidden_size, std)

    def forward(self, x: Tensor, spans: AttentionSpans, selection: TokenSelection | None) -> Tensor:
        """[B, T, D] -> [B, T, D], or [R, D] with a selection."""
        p = self.dropout if self.training else 0.0
        if selection is not None and x.is_cpu and not torch.compiler.is_compiling():
            return self.out(self._selected_context(x, spans.mask, selection.indices, p))
        return self.out(select_tokens(self.masked_context(x, spans.mask, p), selection))

    def masked_context(self, x: Tensor, mask: Tensor | None, p: float) -> Tensor:  # [B, T, D] -> [B, T, D]
        """What attention, with dropout `p`, gathers for every token; heads side by side."""
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, E]
        return attention(query, key, value, mask, p).transpose(1, 2).flatten(2)

    def _selected_context(self, x: Tensor, mask: Tensor | None, indices: Tensor, p: float) -> Tensor:  # -> [R, D]
        """The same for the tokens `indices` alone: only keys and values are computed for the others."""
        width = x.shape[-1]
        query = self.qkv(x.flatten(0, 1).index_select(0, indices), outputs=(0, width))  # [R, D]
        packed = self.qkv(x, outputs=(width, 2 * width)).unflatten(-1, (2, self.num_heads, -1))
        key, value = packed.permute(2, 0, 3, 1, 4)  # 2 x [B, H, T, E]
        return selected_attention(query.unflatten(1, (self.num_heads, -1)), key, value, mask, indices, p).flatten(1)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.hidden_size, config.intermediate_size, std)
        self.down = Linear(config.intermediate_size, config.hidden_size, std)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return self.down(activation(self.up(x), self.activation))


class Block(nn.Module):
    """One Transformer layer: post-LN (Devlin et al. 2019) or pre-LN (Shoeybi et al. 2019, section 5.3, figure 7).

    Every block of a model has the same parameter names and shapes, so any block can be copied onto any other.
    """

    attention_class, feed_forward_class, norm_class = Attention, FeedForward, LayerNorm

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = self.attention_class(config, std)
        self.attention_norm = self.norm_class(config)
        self.feed_forward = self.feed_forward_class(config, std)
        self.feed_forward_norm = self.norm_class(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, spans: AttentionSpans, selection: TokenSelection | None = None) -> Tensor:
        """Transform x [B, T, D] to [B, T, D].

        With a selection only its tokens are computed beyond keys and values, and the result is [R, D]: all that a
        model's last block owes to heads that read some positions only.
        """
        if self.pre_norm:
            x = select_tokens(x, selection) + self.dropout(self.attention(self.attention_norm(x), spans, selection))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(select_tokens(x, selection) + self.dropout(self.attention(x, spans, selection)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
