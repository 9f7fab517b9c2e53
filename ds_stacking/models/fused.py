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

    def add_norm(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, p: float, seed: Tensor | None, *, pre_norm: bool
    ) -> tuple[Tensor, Tensor]:
        """Return y = LayerNorm(z), where z = residual + dropout(x + bias), and the residual that follows.

        That is z in a pre-LN model, else y again. All are [..., D].
        """
        both = kernels.add_layer_norm(
            x, self.weight, self.bias, residual=residual, bias=bias, dropout=p, seed=seed, eps=self.eps,
            return_sum=pre_norm, twice=not pre_norm,
        )  # fmt: skip
        assert isinstance(both, tuple)
        return both


class FusedEmbeddings(Embeddings):
    """With post-LN all of it is one kernel; with pre-LN the first block's norm drops what is dropped."""

    norm_class = FusedLayerNorm

    def forward(  # type: ignore[override]  # what FusedBlock reads is two tensors
        self,
        input_ids: Tensor,
        positions: Tensor,
        token_type_ids: Tensor | None,
        seed: Tensor | None,
        *,
        next_norm: FusedLayerNorm,
    ) -> tuple[Tensor, Tensor]:
        """Return what the first block reads; `next_norm` is its first one, which pre-LN applies here."""
        p = self.dropout.probability if self.training else 0.0
        if self.norm is None:
            return next_norm.add_norm(
                self._sum(input_ids, positions, token_type_ids), None, None, p, seed, pre_norm=True
            )
        both = kernels.embedding_norm(
            input_ids.flatten(),
            positions.flatten(),
            None if token_type_ids is None else token_type_ids.flatten(),
            word=self.word.weight,
            position=self.position.weight,
            segment=self.token_type.weight,
            weight=self.norm.weight,
            shift=self.norm.bias,
            dropout=p,
            seed=seed,
            eps=self.norm.eps,
            twice=True,
        )
        y, again = (x.unflatten(0, input_ids.shape) for x in both)
        return y, again

    def _sum(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """The sum of the three embeddings, [B, T, D]."""
        place = kernels.look_up(self.position.weight, positions)
        table = self.token_type.weight
        kind = table.narrow(0, 0, 1) if token_type_ids is None else kernels.look_up(table, token_type_ids)
        return self.word(input_ids) + (place + kind)


class FusedAttention(Attention):
    """Attention span by span where spans have bounds; without the bias of `out`, which the next LayerNorm adds.

    Its backward pass sums the gradient of QKV's bias, which the product has added.
    """

    def forward(
        self, x: Tensor, spans: AttentionSpans, selection: TokenSelection | None, seed: Tensor | None = None
    ) -> Tensor:
        p = self.dropout if self.training else 0.0
        if spans.cu_seqlens is None:
            context = self.masked_context(x, spans.mask, p)
        elif selection is not None:
            context = self._selected(x, spans.cu_seqlens, spans.max_seqlen, selection, p, seed)
            return self.out(context, biased=False)
        else:
            packed = self.qkv(x, bias_gradient=False).unflatten(-1, (3, self.num_heads, -1)).flatten(0, 1)
            context = kernels.attention(  # [N, 3, H, E] -> [N, H, E]
                packed, spans.cu_seqlens, spans.max_seqlen, dropout=p, seed=seed, bias=self.qkv.bias
            ).view_as(x)
        return self.out(_select_tokens(context, selection), biased=False)

    def _selected(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        selection: TokenSelection,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:  # [B, T, D] -> [R, D]
        """What attention gathers for the selected tokens: only keys and values are computed for the others."""
        width = x.shape[-1]
        queries = self.qkv(_select_tokens(x, selection), outputs=(0, width)).unflatten(-1, (self.num_heads, -1))
        packed = self.qkv(x, outputs=(width, 2 * width)).unflatten(-1, (2, self.num_heads, -1)).flatten(0, 1)
        context = kernels.selected_attention(
            queries, packed, cu_seqlens, max_seqlen, selection.indices, dropout=p, seed=seed
        )
        return context.flatten(1)


class FusedFeedForward(FeedForward):
    """The first bias is added with the activation, the second is left to the next LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        approximate: Literal["tanh", "none"] = "tanh" if self.activation == "gelu_tanh" else "none"
        x = kernels.bias_gelu(self.up(x, biased=False), self.up.bias, approximate=approximate)
        return self.down(x, biased=False)


class FusedBlock(Block):
    """Each residual sum is in the LayerNorm that follows it: with pre-LN the second one in that of the next block.

    So a block reads and returns two tensors, the input of a block's first product and the residual: with post-LN one
    tensor twice, with pre-LN the stream's LayerNorm, whose own block never applies it, and the stream.
    """

    attention_class, feed_forward_class, norm_class = FusedAttention, FusedFeedForward, FusedLayerNorm
    attention_norm: FusedLayerNorm
    feed_forward_norm: FusedLayerNorm

    def forward(  # type: ignore[override]  # see above
        self,
        y: Tensor,
        spans: AttentionSpans,
        selection: TokenSelection | None,
        residual: Tensor,
        seeds: tuple[Tensor | None, ...],
        *,
        next_norm: FusedLayerNorm,
    ) -> tuple[Tensor, Tensor]:
        """Transform `y` and `residual`, both [B, T, D] ([R, D] with a selection).

        `seeds` are those of three dropouts. `next_norm` is the LayerNorm that follows a pre-LN block: the next one's
        first or the model's last. By keyword, because DeepSpeed looks for tensors in the other arguments.
        """
        p, pre_norm = self.dropout.probability if self.training else 0.0, self.pre_norm
        middle, end = (
            (self.feed_forward_norm, next_norm) if pre_norm else (self.attention_norm, self.feed_forward_norm)
        )
        residual = _select_tokens(residual, selection)
        y = self.attention(y, spans, selection, seeds[0])
        # ZeRO-3 frees a module's parameters when it has run: a bias is read after that, which gathers it again.
        y, residual = middle.add_norm(y, residual, self.attention.out.bias, p, seeds[1], pre_norm=pre_norm)
        y = self.feed_forward(y)
        return end.add_norm(y, residual, self.feed_forward.down.bias, p, seeds[2], pre_norm=pre_norm)


class FusedMaskedLMHead(MaskedLMHead):
    """With labels it returns the sum of their cross entropies, fp32, from one operator."""

    norm_class = FusedLayerNorm

    def forward(self, hidden: Tensor, word_embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden, word_embedding)
        return kernels.linear_cross_entropy(self.transform(hidden), word_embedding, self.bias, labels)


class FusedBert(Bert):
    """`Bert` of these parts."""

    embeddings_class, block_class = FusedEmbeddings, FusedBlock
    norm_class, mlm_head_class = FusedLayerNorm, FusedMaskedLMHead

    def encode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        token_type_ids: Tensor | None,
        spans: AttentionSpans,
        selection: TokenSelection | None,
    ) -> Tensor:
        norms = [*(block.attention_norm for block in self.blocks), self.final_norm]
        seeds, last = self._seeds(input_ids.device), len(self.blocks) - 1
        y, residual = self.embeddings(input_ids, positions, token_type_ids, seeds[0], next_norm=norms[0])
        for index, block in enumerate(self.blocks):
            own, chosen = seeds[1 + 3 * index : 4 + 3 * index], selection if index == last else None
            y, residual = self.run_block(block, y, spans, chosen, residual, own, next_norm=norms[index + 1])
        return y

    def _seeds(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """A seed for each dropout, of the embeddings and three of every block, from one draw; None where none drops.

        They are inputs of the blocks, so that a block computed again in the backward pass drops the same.
        """
        number = 1 + 3 * len(self.blocks)
        if not (self.training and (self.config.dropout or self.config.attention_dropout)):
            return (None,) * number
        return kernels.new_seeds(number, device)

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
