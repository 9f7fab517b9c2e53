"""BERT for masked language modelling, post-LN or pre-LN, that computes what its loss needs and no more.

A batch is B sequences of T tokens without padding. With `cu_seqlens` they hold several documents one after the other
that never see each other, each with positions from 0: the same as each in a padded sequence of its own.

Shapes: B sequences of T tokens, N = B*T, M masked tokens of the batch, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig
from ds_stacking.models.blocks import AttentionSpans, Block, Embedding, LayerNorm, TokenSelection
from ds_stacking.models.heads import MaskedLMHead, NextSentenceHead
from ds_stacking.models.ops import Dropout

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
    """Output of the encoder: [B, T, D], or with `masked_positions` only these tokens, [M, D]."""
    next_sentence_loss_sum: Tensor | None
    """Sum over sequences of the next-sentence cross entropy in nats, fp32."""
    next_sentence_logits: Tensor | None
    """Scores of the next-sentence head [B, 2]; None where the model has none."""


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings; with post-LN followed by LayerNorm; then dropout."""

    norm_class = LayerNorm

    def __init__(self, config: ModelConfig, std: float | None) -> None:
        super().__init__()
        self.word = Embedding(config.vocab_size, config.hidden_size, std)
        self.position = Embedding(config.max_positions, config.hidden_size, std)
        self.token_type = Embedding(TOKEN_TYPES, config.hidden_size, std)
        self.norm = self.norm_class(config) if config.norm == "post" else None
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """[B, T], [T] or [B, T], [B, T] -> [B, T, D]."""
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

    embeddings_class, block_class, norm_class, mlm_head_class = Embeddings, Block, LayerNorm, MaskedLMHead

    def __init__(self, config: ModelConfig, num_layers: int, *, initialize: bool = True) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise UserError("model.vocab_size is 0; give the number of rows of the embedding.")
        if num_layers < 1:
            raise UserError(f"A model of {num_layers} layers cannot be built; it needs one or more.")
        std = config.initializer_range if initialize else None
        self.config = config
        self.embeddings = self.embeddings_class(config, std)
        self.blocks = nn.ModuleList(self.block_class(config, std) for _ in range(num_layers))
        self.final_norm = self.norm_class(config) if config.norm == "pre" else nn.Identity()
        self.mlm_head = self.mlm_head_class(config, std)
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

        `cu_seqlens`, int32 [S + 1], are the bounds of S documents among the N tokens, from 0 to N; every sequence's
        start is one of them. `max_seqlen` is the longest document or more, T if not given. Documents that lie in no
        sequences are one: [1, N].

        With `masked_positions` the head and, keys and values apart, the last block compute these tokens only.
        """
        assert attention_mask is None or cu_seqlens is None, "documents need no mask"
        positions, document = self._positions(input_ids, cu_seqlens)
        spans = self.attention_spans(input_ids, attention_mask, document, cu_seqlens, max_seqlen)
        selection = self._selection(input_ids, masked_positions)
        hidden = self.encode(input_ids, positions, token_type_ids, spans, selection)
        hidden, first_tokens = self._split(hidden, len(input_ids), selection)
        loss_sum, token_losses, logits = self.score(hidden.flatten(0, -2), labels)
        pair_logits = None if self.next_sentence_head is None else self.next_sentence_head(first_tokens)
        pair_loss = None
        if pair_logits is not None and next_sentence_labels is not None:
            pair_loss = cross_entropy(pair_logits, next_sentence_labels).sum()
        return BertOutput(loss_sum, token_losses, logits, hidden, pair_loss, pair_logits)

    def _positions(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every token's position, [T] or [B, T], and where there are documents the index of its document, [B, T]."""
        (batch, length), device = input_ids.shape, input_ids.device
        if cu_seqlens is None:
            return torch.arange(length, device=device), None
        every = torch.arange(batch * length, dtype=torch.int32, device=device)
        document = torch.searchsorted(cu_seqlens.narrow(0, 1, len(cu_seqlens) - 1), every, right=True)
        positions = every - cu_seqlens.index_select(0, document)
        return positions.long().view(batch, length), document.view(batch, length)

    def attention_spans(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> AttentionSpans:
        """Which tokens attend to each other; `document` [B, T] says of every token in which one it lies."""
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None, :].bool()
        elif document is not None:
            mask = document[:, None, :, None] == document[:, None, None, :]
        return AttentionSpans(mask, None, input_ids.shape[1])

    def token_selection(self, indices: Tensor, tokens: int) -> TokenSelection:
        """The selection of the tokens `indices` out of so many."""
        return TokenSelection(indices, None)

    def score(self, hidden: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The first three fields of BertOutput, from hidden [K, D] and labels of K elements."""
        logits = self.mlm_head(hidden, self.embeddings.word.weight)
        if labels is None:
            return None, None, logits
        token_losses = cross_entropy(logits, labels.flatten())
        return token_losses.sum(), token_losses, logits

    def encode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        token_type_ids: Tensor | None,
        spans: AttentionSpans,
        selection: TokenSelection | None,
    ) -> Tensor:
        """Embeddings, blocks and final norm: [B, T, D], or the selected tokens [R, D]."""
        x, last = self.embeddings(input_ids, positions, token_type_ids), len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x, spans, selection if index == last else None)
        return self.final_norm(x)

    def run_block(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call `block`, which is computed again in the backward pass where the configuration says so."""
        if self.config.gradient_checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False, **kwargs)
        return block(*args, **kwargs)

    def _selection(self, input_ids: Tensor, masked: Tensor | None) -> TokenSelection | None:
        """The tokens that a head reads, None for all: first the sequences' first ones, if a head reads these."""
        if masked is None:
            return None
        batch, length = input_ids.shape
        if self.next_sentence_head is not None:
            masked = torch.cat((torch.arange(0, batch * length, length, device=masked.device), masked))
        return self.token_selection(masked, batch * length)

    def _split(self, x: Tensor, batch: int, selection: TokenSelection | None) -> tuple[Tensor, Tensor | None]:
        """Of [B, T, D] or [R, D] the tokens of the MLM head, and the first ones [B, D] if a head reads these."""
        if selection is None:
            return x, x[:, 0]
        if self.next_sentence_head is None:
            return x, None
        return x[batch:], x[:batch]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # [N, V], [N] -> [N]
    """Cross entropy per row in nats, computed in fp32 whatever the type of the logits."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
