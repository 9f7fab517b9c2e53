"""`Bert` with what surrounds its matrix products in fused kernels: the same parameters, initial values and results.

Imported by models/variants.py alone, since the kernels' import takes seconds. Shapes are those of models/blocks.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ds_stacking import kernels
from ds_stacking.models.bert import Bert, Embeddings
from ds_stacking.models.blocks import Attention, AttentionSpans, Block, FeedForward, LayerNorm, TokenSelection
from ds_stacking.models.heads import MaskedLMHead


class FusedLayerNorm(LayerNorm):
    """LayerNorm, alone or of the residual sum before it."""

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        y = kernels.add_layer_norm(x, self.weight, self.bias, eps=self.eps)
        assert isinstance(y, Tensor)
        return y

    def add_norm(self, x: Tensor, residual: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Return LayerNorm(z) and z = residual + dropout(x + bias), all [..., D]."""
        both = kernels.add_layer_norm(
            x, self.weight, self.bias, residual=residual, bias=bias, dropout=p, eps=self.eps, return_sum=True
        )
        assert isinstance(both, tuple)
        return both


class FusedEmbeddings(Embeddings):
    """With post-LN all of it is one kernel; pre-LN has no norm to fuse."""

    norm_class = FusedLayerNorm

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if self.norm is None:
            return super().forward(input_ids, positions, token_type_ids)
        x = kernels.embedding_norm(
            input_ids.flatten(),
            positions.expand_as(input_ids).flatten(),
            torch.zeros_like(input_ids).flatten() if token_type_ids is None else token_type_ids.flatten(),
            word=self.word.weight,
            position=self.position.weight,
            segment=self.token_type.weight,
            weight=self.norm.weight,
            shift=self.norm.bias,
            dropout=self.dropout.probability if self.training else 0.0,
            eps=self.norm.eps,
        )
        return x.unflatten(0, input_ids.shape)


class FusedAttention(Attention):
    """Attention span by span where spans have bounds; without the bias of `out`, which the next LayerNorm adds."""

    def forward(self, x: Tensor, spans: AttentionSpans, selection: TokenSelection | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        if spans.cu_seqlens is None:
            context = self.masked_context(x, spans.mask, p)
        elif selection is not None:
            return self.out(self._selected(x, spans.cu_seqlens, spans.max_seqlen, selection, p), biased=False)
        else:
            packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(0, 1)  # [N, 3, H, E]
            context = kernels.attention(packed, spans.cu_seqlens, spans.max_seqlen, dropout=p).view_as(x)
        return self.out(_select_tokens(context, selection), biased=False)

    def _selected(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, selection: TokenSelection, p: float
    ) -> Tensor:  # [B, T, D] -> [R, D]
        """What attention gathers for the selected tokens: only keys and values are computed for the others."""
        width = x.shape[-1]
        queries = self.qkv(_select_tokens(x, selection), outputs=(0, width)).unflatten(-1, (self.num_heads, -1))
        packed = self.qkv(x, outputs=(width, 2 * width)).unflatten(-1, (2, self.num_heads, -1)).flatten(0, 1)
        context = kernels.selected_attention(queries, packed, cu_seqlens, max_seqlen, selection.indices, dropout=p)
        return context.flatten(1)


class FusedFeedForward(FeedForward):
    """The first bias is added with the activation; with `biased=False` the second is left to the next LayerNorm."""

    def forward(self, x: Tensor, *, biased: bool = True) -> Tensor:  # [..., D] -> [..., D]
        approximate: Literal["tanh", "none"] = "tanh" if self.activation == "gelu_tanh" else "none"
        x = kernels.bias_gelu(self.up(x, biased=False), self.up.bias, approximate=approximate)
        return self.down(x, biased=biased)


class FusedBlock(Block):
    """Each residual sum is in the LayerNorm that follows it in this block."""

    attention_class, feed_forward_class, norm_class = FusedAttention, FusedFeedForward, FusedLayerNorm
    attention_norm: FusedLayerNorm
    feed_forward_norm: FusedLayerNorm

    def forward(self, x: Tensor, spans: AttentionSpans, selection: TokenSelection | None = None) -> Tensor:
        p = self.dropout.probability if self.training else 0.0
        # ZeRO-3 frees a module's parameters when it has run: a bias is read after that, which gathers it again.
        if self.pre_norm:
            y = self.attention(self.attention_norm(x), spans, selection)
            y, x = self.feed_forward_norm.add_norm(y, _select_tokens(x, selection), self.attention.out.bias, p)
            return x + self.dropout(self.feed_forward(y))
        y = self.attention(x, spans, selection)
        x, _ = self.attention_norm.add_norm(y, _select_tokens(x, selection), self.attention.out.bias, p)
        y = self.feed_forward(x, biased=False)
        return self.feed_forward_norm.add_norm(y, x, self.feed_forward.down.bias, p)[0]


class FusedMaskedLMHead(MaskedLMHead):
    """With labels it returns the sum of their cross entropies, fp32, from a kernel that keeps no scores."""

    norm_class = FusedLayerNorm

    def forward(self, hidden: Tensor, word_embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden, word_embedding)
        return kernels.linear_cross_entropy(self.transform(hidden), word_embedding, self.bias, labels)


class FusedBert(Bert):
    """`Bert` of these parts."""

    embeddings_class, block_class = FusedEmbeddings, FusedBlock
    norm_class, mlm_head_class = FusedLayerNorm, FusedMaskedLMHead

    def attention_spans(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> AttentionSpans:
        batch, length = input_ids.shape
        if attention_mask is not None:
            return super().attention_spans(input_ids, attention_mask, document, cu_seqlens, max_seqlen)
        if cu_seqlens is not None:
            return AttentionSpans(None, cu_seqlens, max_seqlen or length)
        bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=input_ids.device)
        return AttentionSpans(None, bounds, length)

    def token_selection(self, indices: Tensor, tokens: int) -> TokenSelection:
        return TokenSelection(indices, kernels.inverse_index(indices, tokens))

    def score(self, hidden: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if labels is None or not self.training:
            return super().score(hidden, labels)
        return self.mlm_head(hidden, self.embeddings.word.weight, labels.flatten()), None, None


def _select_tokens(x: Tensor, selection: TokenSelection | None) -> Tensor:
    """`select_tokens` of models/blocks.py by a kernel."""
    if selection is None or selection.inverse is None:
        return x
    return kernels.gather_rows(x.flatten(0, 1), selection.indices, selection.inverse)
