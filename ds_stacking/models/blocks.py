"""The Transformer block: self-attention and a feed-forward layer, with LayerNorm before or after each.

Shapes: B sequences, T tokens each, D hidden size, H heads, F feed-forward size, R selected rows of the B*T tokens.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ds_stacking.config import ModelConfig
from ds_stacking.models.ops import Dropout, attention, linear


class Linear(nn.Linear):
    """Linear layer with weights drawn from N(0, std^2) and zero bias; with `std=None` both are left unfilled."""

    def __init__(self, in_features: int, out_features: int, std: float | None) -> None:
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Embedding table with rows drawn from N(0, std^2); with `std=None` it is left unfilled."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float | None) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)


def activation(x: Tensor, name: str) -> Tensor:
    """Apply ModelConfig.activation: exact GELU (`gelu`) or its tanh approximation (`gelu_tanh`)."""
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return tokens `rows` [R] of x [B, T, D] as [R, D], or x itself where `rows` is None."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention.

    Query, key and value are one parameter `qkv.weight` [3*D, D], ordered (q, k, v) x head x head size, so that the
    projection of a batch is a view [T, 3, H, D // H] without a copy.
    """

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, std)
        self.out = Linear(config.hidden_size, config.hidden_size, std)

    def forward(self, x: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:  # [B, T, D] -> [B, T, D]
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, D/H]
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, D/H]
        context = attention(query, key, value, mask, self.dropout if self.training else 0.0)  # [B, H, T, D/H]
        context = context.transpose(1, 2).flatten(2)  # [B, T, D]
        return self.out(select_rows(context, rows))


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

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config, std)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config, std)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Transform x [B, T, D] to [B, T, D].

        With `rows` [R] (flat indices into B*T) only these tokens are computed beyond keys and values, and the result
        is [R, D]: all that a model's last block owes to heads that read some positions only.
        `mask` is None or bool [B, 1, 1, T], true where a token may be attended to.
        """
        if self.pre_norm:
            x = select_rows(x, rows) + self.dropout(self.attention(self.attention_norm(x), mask, rows))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(select_rows(x, rows) + self.dropout(self.attention(x, mask, rows)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
