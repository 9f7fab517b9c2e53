"""FLOPs of `Bert` by formula: the multiplications and additions of its matrix products, nothing else.

A product [m, k] x [k, n] is 2*m*k*n. Counted is what the loss needs: attention inside documents, heads and, keys and
values apart, the last block on masked tokens only. Element-wise work, recomputation, and scores that a kernel computes
beyond that are not model FLOPs.
Shapes: T tokens per sequence, D hidden size, F feed-forward size, V vocabulary size.
"""

from __future__ import annotations

from ds_stacking.config import ModelConfig


def training_flops(
    config: ModelConfig,
    num_layers: int,
    *,
    sequences: float,
    length: int,
    masked: float,
    pairs: float | None = None,
    masked_pairs: float | None = None,
) -> float:
    """Return the FLOPs of forward and backward over `sequences` of `length` tokens, `masked` of them predicted.

    `pairs` is the number of (query, key) pairs that see each other, the sum of squared document lengths, and
    `masked_pairs` those with a predicted query; by default a sequence is one document.

    Per token a block costs 4*D*D (key, value), 4*D*D (query, output) and 4*D*F, per pair 4*D (score, weighted sum) in
    the forward pass, and in the backward pass twice that: one gradient product for each operand.
    """
    hidden = config.hidden_size
    tokens = sequences * length
    first_tokens = sequences if config.next_sentence else 0
    rows = masked + first_tokens
    pairs = tokens * length if pairs is None else pairs
    row_pairs = (masked * length if masked_pairs is None else masked_pairs) + first_tokens * length
    every = 4 * hidden**2
    selected = 4 * hidden**2 + 4 * hidden * config.intermediate_size
    whole_blocks = (num_layers - 1) * (tokens * (every + selected) + 4 * hidden * pairs)
    last_block = tokens * every + rows * selected + 4 * hidden * row_pairs
    mlm_head = masked * 2 * hidden * (hidden + config.vocab_size)
    next_sentence_head = first_tokens * 2 * hidden * (hidden + 2)
    return 3 * (whole_blocks + last_block + mlm_head + next_sentence_head)


def training_flops_per_token(config: ModelConfig, num_layers: int, *, length: int, masking_rate: float) -> float:
    """Return `training_flops` per token, with a share `masking_rate` of all tokens predicted."""
    return training_flops(config, num_layers, sequences=1, length=length, masked=length * masking_rate) / length
