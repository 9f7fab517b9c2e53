"""FLOPs of `Bert` by formula: the multiplications and additions of its matrix products, nothing else.

A product [m, k] x [k, n] is 2*m*k*n. Counted is what the model computes: heads and, keys and values apart, the last
block on masked rows only. Element-wise work and the recomputation of gradient checkpointing are not model FLOPs.
Shapes: T tokens per sequence, D hidden size, F feed-forward size, V vocabulary size.
"""

from __future__ import annotations

from ds_stacking.config import ModelConfig


def forward_flops(config: ModelConfig, num_layers: int, *, sequences: int, length: int, masked: float) -> float:
    """Return the FLOPs of one forward pass over `sequences` of `length` tokens with `masked` of them predicted.

    Per token a block costs 2*D*3D (query, key, value), 4*T*D (scores and weighted sum), 2*D*D (output) and 4*D*F.
    """
    hidden = config.hidden_size
    tokens = sequences * length
    rows = masked + (sequences if config.next_sentence else 0)
    everywhere = 6 * hidden**2 + 4 * length * hidden
    selected = 2 * hidden**2 + 4 * hidden * config.intermediate_size
    blocks = num_layers * tokens * everywhere + ((num_layers - 1) * tokens + rows) * selected
    mlm_head = masked * 2 * hidden * (hidden + config.vocab_size)
    next_sentence_head = sequences * 2 * hidden * (hidden + 2) if config.next_sentence else 0
    return blocks + mlm_head + next_sentence_head


def training_flops(config: ModelConfig, num_layers: int, *, sequences: int, length: int, masked: float) -> float:
    """Return the FLOPs of forward and backward: each product has one gradient product per operand, so three times."""
    return 3 * forward_flops(config, num_layers, sequences=sequences, length=length, masked=masked)


def training_flops_per_token(config: ModelConfig, num_layers: int, *, length: int, masking_rate: float) -> float:
    """Return `training_flops` per token, with a share `masking_rate` of all tokens predicted."""
    return training_flops(config, num_layers, sequences=1, length=length, masked=length * masking_rate) / length
