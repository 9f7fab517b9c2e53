"""BERT for masked language modelling, post-LN or pre-LN, that computes what its loss needs and no more.

A batch is B rows of T tokens without padding. A row is one sequence, or, with `cu_seqlens`, several documents one
after the other that never see each other, each with positions from 0: the same as each in a padded row of its own.

Shapes: B rows of T tokens, N = B*T, M masked tokens of the batch, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig
from ds_stacking.models.blocks import Block, Embedding, LayerNorm, Rows, Sequences
from ds_stacking.models.heads import MaskedLMHead, NextSentenceHead
from ds_stacking.models.ops import Dropout, kernels

TOKEN_TYPES = 2
"""Segments that BERT tells apart."""


class BertOutput(NamedTuple):
    """What one forward pass computed. K is M with `masked_positions`, else N.

    A tuple, since ZeRO-3 finds the tensors of a module's output in tuples, lists and dictionaries only.
    """

    loss_sum: Tensor | None
    """Sum over labelled tokens of the cross entropy in nats, fp32; None without labels."""
    token_losses: Tensor | None
    """Cross entropy per token [K] in nats, fp32; 0 where the label is -100. None where `logits` are."""
    logits: Tensor | None
    """Scores over the vocabulary [K, V]; None in training with labels and the fused kernels, which keep none."""
    hidden: Tensor
    """Output of the encoder: [B, T, D], or with `masked_positions` only these rows, [M, D]."""
    next_sentence_loss_sum: Tensor | None
    """Sum over sequences of the next-sentence cross entropy in nats, fp32."""
    next_sentence_logits: Tensor | None
    """Scores of the next-sentence head [B, 2]; None where the model has none."""


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings; with post-LN followed by LayerNorm; then dropout."""

    def __init__(self, config: ModelConfig, std: float | None, fused: bool) -> None:
        super().__init__()
        self.word = Embedding(config.vocab_size, config.hidden_size, std)
        self.position = Embedding(config.max_positions, config.hidden_size, std)
        self.token_type = Embedding(TOKEN_TYPES, config.hidden_size, std)
        self.norm = LayerNorm(config, fused) if config.norm == "post" else None
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """[B, T], [T] or [B, T], [B, T] -> [B, T, D]."""
        if self.norm is not None and self.norm.fused:
            return self._fused(self.norm, input_ids, positions, token_type_ids)
        # Without token types the small [T, D] tables are added first: one pass over [B, T, D] less.
        token_type = self.token_type(torch.zeros_like(positions) if token_type_ids is None else token_type_ids)
        x = self.word(input_ids) + (self.position(positions) + token_type)
        return self.dropout(x if self.norm is None else self.norm(x))

    def _fused(self, norm: LayerNorm, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        x = kernels().embedding_norm(
            input_ids.flatten(),
            positions.expand_as(input_ids).flatten(),
            torch.zeros_like(input_ids).flatten() if token_type_ids is None else token_type_ids.flatten(),
            word=self.word.weight,
            position=self.position.weight,
            segment=self.token_type.weight,
            weight=norm.weight,
            shift=norm.bias,
            dropout=self.dropout.probability if self.training else 0.0,
            eps=norm.eps,
        )
        return x.unflatten(0, input_ids.shape)


class Bert(nn.Module):
    """BERT encoder with its masked-LM head and, if configured, its next-sentence head.

    `blocks` is the container in which growth finds the Transformer blocks. With `initialize=False` weights are
    allocated but not drawn, for a caller that overwrites them all; else they follow N(0, initializer_range^2), biases
    are zero, and the torch seed decides them. `fused` computes the same with the kernels of `ds_stacking.kernels`.
    """

    def __init__(self, config: ModelConfig, num_layers: int, *, initialize: bool = True, fused: bool = False) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise UserError("model.vocab_size is 0; give the number of rows of the embedding.")
        if num_layers < 1:
            raise UserError(f"A model of {num_layers} layers cannot be built; it needs one or more.")
        std = config.initializer_range if initialize else None
        self.config, self.fused = config, fused
        self.embeddings = Embeddings(config, std, fused)
        self.blocks = nn.ModuleList(Block(config, std, fused) for _ in range(num_layers))
        self.final_norm = LayerNorm(config, fused) if config.norm == "pre" else nn.Identity()
        self.mlm_head = MaskedLMHead(config, std, fused)
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
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_type_ids: Tensor | None = None,
        next_sentence_labels: Tensor | None = None,
    ) -> BertOutput:
        """Encode and score a batch.

        `input_ids`, `attention_mask` (nonzero: a real token) and `token_type_ids` are [B, T]; `masked_positions` [M]
        are flat indices into N; `labels` [M] are the true tokens there ([B, T] without masked positions; -100 is
        ignored); `next_sentence_labels` are [B].

        `cu_seqlens`, int32 [S + 1], are the bounds of S documents among the N tokens, from 0 to N; every row's start
        is one of them. `max_seqlen` is the longest document or more, T if not given. Where documents are all that
        there is, without rows, they are one row: [1, N].

        With `masked_positions` the head and, keys and values apart, the last block compute these rows only.
        """
        sequences, positions = self._sequences(input_ids, attention_mask, cu_seqlens, max_seqlen)
        hidden = self.embeddings(input_ids, positions, token_type_ids)
        hidden, first_tokens = self._encode(hidden, sequences, masked_positions)
        rows, word = hidden.flatten(0, -2), self.embeddings.word.weight
        logits, token_losses, loss_sum = None, None, None
        if self.fused and self.training and labels is not None:
            loss_sum = self.mlm_head(rows, word, labels.flatten())
        else:
            logits = self.mlm_head(rows, word)
            token_losses = None if labels is None else cross_entropy(logits, labels.flatten())
            loss_sum = None if token_losses is None else token_losses.sum()
        pair_logits = None if self.next_sentence_head is None else self.next_sentence_head(first_tokens)
        pair_loss = None
        if pair_logits is not None and next_sentence_labels is not None:
            pair_loss = cross_entropy(pair_logits, next_sentence_labels).sum()
        return BertOutput(loss_sum, token_losses, logits, hidden, pair_loss, pair_logits)

    def _sequences(
        self, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> tuple[Sequences, Tensor]:
        """Which tokens see each other, and their positions, [T] or [B, T]."""
        (batch, length), device = input_ids.shape, input_ids.device
        positions = torch.arange(length, device=device)
        if attention_mask is not None:
            assert cu_seqlens is None, "documents need no mask"
            return Sequences(attention_mask[:, None, None, :].bool(), None, length), positions
        if cu_seqlens is None:
            bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
            return Sequences(None, bounds if self.fused else None, length), positions
        every = torch.arange(batch * length, dtype=torch.int32, device=device)
        document = torch.searchsorted(cu_seqlens.narrow(0, 1, len(cu_seqlens) - 1), every, right=True)
        positions = (every - cu_seqlens.index_select(0, document)).long().view(batch, length)
        if self.fused:
            return Sequences(None, cu_seqlens, max_seqlen or length), positions
        document = document.view(batch, 1, length)
        return Sequences((document[..., None] == document[:, :, None]), None, length), positions

    def _encode(self, x: Tensor, sequences: Sequences, masked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the blocks; return the rows that the MLM head reads and the first tokens [B, D] if one reads these."""
        batch, length, _ = x.shape
        indices, rows = masked, None
        if masked is not None and self.next_sentence_head is not None:
            indices = torch.cat((torch.arange(0, batch * length, length, device=x.device), masked))
        if indices is not None:
            rows = Rows(indices, kernels().inverse_index(indices, batch * length) if self.fused else None)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, sequences, rows if index == last else None)
        x = self.final_norm(x)
        if masked is None:
            return x, x[:, 0]
        if indices is masked:
            return x, None
        return x[batch:], x[:batch]

    def _run(self, block: nn.Module, x: Tensor, sequences: Sequences, rows: Rows | None) -> Tensor:
        if self.config.gradient_checkpointing and self.training:
            return checkpoint(block, x, sequences, rows, use_reentrant=False)
        return block(x, sequences, rows)


def has_kernels(device: torch.device) -> bool:
    """Whether `device` runs the fused kernels themselves rather than their references: NVIDIA from Ampere, MI300."""
    return device.type == "cuda" and kernels().runs_kernels(torch.empty(0, device=device))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # [N, V], [N] -> [N]
    """Cross entropy per row in nats, computed in fp32 whatever the type of the logits."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
