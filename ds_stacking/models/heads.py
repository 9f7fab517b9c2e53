"""BERT's two pre-training heads (Devlin et al. 2019, section 3.1).

Shapes: N selected tokens, B sequences, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_stacking.config import ModelConfig
from ds_stacking.models.blocks import LayerNorm, Linear, activation
from ds_stacking.models.ops import linear


class MaskedLMHead(nn.Module):
    """Dense layer, GELU, LayerNorm, then a decoder tied to the word embedding, with a bias of its own."""

    norm_class = LayerNorm

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.activation, self.std = config.activation, std
        self.dense = Linear(config.hidden_size, config.hidden_size, std)
        self.norm = self.norm_class(config)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the decoder's bias; the other weights are those of modules of their own."""
        if self.std is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """Return the scores of hidden [N, D] over the words [V, D], [N, V]."""
        return linear(self.transform(hidden), word_embedding, self.bias)

    def transform(self, hidden: Tensor) -> Tensor:  # [N, D] -> [N, D]
        """All before the decoder."""
        return self.norm(activation(self.dense(hidden), self.activation))


class NextSentenceHead(nn.Module):
    """Pooler (dense layer and tanh on a sequence's first token) and a classifier of two classes.

    Class 0: the second segment continues the first; class 1: it comes from elsewhere.
    """

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.pooler = Linear(config.hidden_size, config.hidden_size, std)
        self.classifier = Linear(config.hidden_size, 2, std)

    def forward(self, first_token: Tensor) -> Tensor:  # [B, D] -> [B, 2]
        return self.classifier(torch.tanh(self.pooler(first_token)))
