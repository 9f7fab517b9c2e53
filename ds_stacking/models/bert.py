"""BERT for masked language modelling, post-LN or pre-LN, that computes what its loss needs and no more.

Shapes: B sequences, T tokens each, M masked tokens of the batch, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_stacking.config import ModelConfig, UserError
from ds_stacking.models.blocks import Block, Embedding
from ds_stacking.models.heads import MaskedLMHead, NextSentenceHead
from ds_stacking.models.ops import Dropout

TOKEN_TYPES = 2
"""Segments that BERT tells apart."""


class BertOutput(NamedTuple):
    """What one forward pass computed. N is M with `masked_positions`, else B*T.

    A tuple, since ZeRO-3 finds the tensors of a module's output in tuples, lists and dictionaries only.
    """

    loss_sum: Tensor | None
    """Sum over labelled tokens of the cross entropy in nats, fp32; None without labels."""
    token_losses: Tensor | None
    """Cross entropy per token [N] in nats, fp32; 0 where the label is -100."""
    logits: Tensor
    """Scores over the vocabulary [N, V]."""
    hidden: Tensor
    """Output of the encoder: [B, T, D], or with `masked_positions` only these rows, [M, D]."""
    next_sentence_loss_sum: Tensor | None
    """Sum over sequences of the next-sentence cross entropy in nats, fp32."""
    next_sentence_logits: Tensor | None
    """Scores of the next-sentence head [B, 2]; None where the model has none."""


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings; with post-LN followed by LayerNorm; then dropout."""

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.word = Embedding(config.vocab_size, config.hidden_size, std)
        self.position = Embedding(config.max_positions, config.hidden_size, std)
        self.token_type = Embedding(TOKEN_TYPES, config.hidden_size, std)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm == "post" else None
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:  # [B, T], [B, T] -> [B, T, D]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Without token types the small [T, D] tables are added first: one pass over [B, T, D] less.
        token_type = self.token_type(torch.zeros_like(positions) if token_type_ids is None else token_type_ids)
        x = self.word(input_ids) + (self.position(positions) + token_type)
        return self.dropout(x if self.norm is None else self.norm(x))


class Bert(nn.Module):
    """BERT encoder with its masked-LM head and, if configured, its next-sentence head.

    `blocks` is the container in which growth finds the Transformer blocks. With `initialize=False` weights are
    allocated but not drawn, for a caller that overwrites them all; else they follow N(0, initializer_range^2), biases
    are zero, and the torch seed decides them.
    """

    def __init__(self, config: ModelConfig, num_layers: int, *, initialize: bool = True) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise UserError("model.vocab_size is 0; give the number of rows of the embedding.")
        if num_layers < 1:
            raise UserError(f"A model of {num_layers} layers cannot be built; it needs one or more.")
        std = config.initializer_range if initialize else None
        self.config = config
        self.embeddings = Embeddings(config, std)
        self.blocks = nn.ModuleList(Block(config, std) for _ in range(num_layers))
        pre_norm = config.norm == "pre"
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pre_norm else nn.Identity()
        self.mlm_head = MaskedLMHead(config, std)
        self.next_sentence_head = NextSentenceHead(config, std) if config.next_sentence else None

    @property
    def num_parameters(self) -> int:
        """Number of weights, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        *,
        masked_positions: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        next_sentence_labels: Tensor | None = None,
    ) -> BertOutput:
        """Encode and score a batch.

        `input_ids`, `attention_mask` (nonzero: a real token) and `token_type_ids` are [B, T]; `masked_positions` [M]
        are flat indices into B*T; `labels` [M] are the true tokens there ([B, T] without masked positions; -100 is
        ignored); `next_sentence_labels` are [B].

        With `masked_positions` the head and, keys and values apart, the last block compute these rows only.
        """
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # [B, 1, 1, T]
        hidden, first_tokens = self._encode(hidden, mask, masked_positions)
        logits = self.mlm_head(hidden.flatten(0, -2), self.embeddings.word.weight)
        token_losses = None if labels is None else cross_entropy(logits, labels.flatten())
        pair_logits = None if self.next_sentence_head is None else self.next_sentence_head(first_tokens)
        pair_loss = None
        if pair_logits is not None and next_sentence_labels is not None:
            pair_loss = cross_entropy(pair_logits, next_sentence_labels).sum()
        loss_sum = None if token_losses is None else token_losses.sum()
        return BertOutput(loss_sum, token_losses, logits, hidden, pair_loss, pair_logits)

    def _encode(self, x: Tensor, mask: Tensor | None, masked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the blocks; return the rows that the MLM head reads and the first tokens [B, D] if one reads these."""
        batch, length, _ = x.shape
        rows = masked
        if masked is not None and self.next_sentence_head is not None:
            rows = torch.cat((torch.arange(0, batch * length, length, device=x.device), masked))
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, mask, rows if index == last else None)
        x = self.final_norm(x)
        if masked is None:
            return x, x[:, 0]
        if rows is masked:
            return x, None
        return x[batch:], x[:batch]

    def _run(self, block: nn.Module, x: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
        if self.config.gradient_checkpointing and self.training:
            return checkpoint(block, x, mask, rows, use_reentrant=False)
        return block(x, mask, rows)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # [N, V], [N] -> [N]
    """Cross entropy per row in nats, computed in fp32 whatever the type of the logits."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def without_weight_decay(name: str) -> bool:
    """Tell from a parameter's name whether BERT trains it without weight decay: biases and LayerNorm parameters."""
    module, _, kind = name.rpartition(".")
    return kind == "bias" or module.endswith("norm")
