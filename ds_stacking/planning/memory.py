"""Bytes on one GPU: states by ZeRO stage, activations of a micro-batch, DeepSpeed's buffers.

Rajbhandari et al. 2020, "ZeRO", section 3, with the optimizer's 12 bytes per weight: fp32 master and two moments.
Shapes: N tokens of a micro-batch, M of them predicted, D hidden size, F feed-forward size, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert

OPTIMIZER = 12
"""Bytes per weight of master and moments."""
KEPT_BYTES = 512 * 2**20
"""Scores of so many bytes are kept by the fused head. Both numbers are those of kernels/linear_cross_entropy.py, which
plans cannot import, since they are also made where there is no Triton."""
SLICE = 8192
"""Columns of the vocabulary whose scores it holds at a time where it does not keep them."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    states: float
    """Weights, gradients, masters and moments."""
    activations: float
    """What the forward pass of a micro-batch keeps for the backward pass, and the head's scores."""
    buffers: float
    """The fp32 copy of gradients in the optimizer's step, and DeepSpeed's buckets."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.activations + self.buffers


def parameter_count(config: ModelConfig, layers: int) -> int:
    """Weights of a model, the tied embedding counted once. Raises UserError for sizes that no tensor can have."""
    try:
        with torch.device("meta"):
            one, two = (Bert(config, depth, initialize=False).num_parameters for depth in (1, 2))
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"No model can have model.hidden_size {config.hidden_size}, model.intermediate_size "
            f"{config.intermediate_size}, model.max_positions {config.max_positions} and model.vocab_size "
            f"{config.vocab_size} ({str(error).splitlines()[0][:100]}); give less."
        ) from None
    return one + (layers - 1) * (two - one)


def state_bytes(parameters: int, *, zero_stage: int, world_size: int, item: int) -> float:
    """Weights, gradients and the optimizer's state on one GPU; `item` is bytes of a working weight, 2 or 4."""
    weights = item / (world_size if zero_stage == 3 else 1)
    gradients = item / (world_size if zero_stage >= 2 else 1)
    optimizer = OPTIMIZER / (world_size if zero_stage >= 1 else 1)
    return parameters * (weights + gradients + optimizer)


def sum_bytes(parameters: int, *, zero_stage: int, world_size: int, item: int, accumulates: bool) -> float:
    """What the gradients of a step take beside `state_bytes`.

    Under ZeRO 2 they cross GPUs once per step, so that each holds those of all weights until then. A step that
    `accumulates` several micro-batches has their fp32 sums as well, in stage 3 in the place of the parts.
    """
    if zero_stage == 3:
        return parameters * (4 - item) / world_size if accumulates else 0.0
    whole = item - item / world_size if zero_stage == 2 else 0.0
    return parameters * (whole + 4 * accumulates)


def buffer_bytes(parameters: int, *, bucket: int, zero_stage: int, world_size: int, item: int) -> float:
    """One fp32 copy of this GPU's gradients in the step, and in stage 3 buckets for gradients and weights."""
    copy = 4 * parameters / (world_size if zero_stage else 1)
    return copy + (2 * item * min(bucket, parameters) if zero_stage == 3 else 0)


def activation_bytes(config: ModelConfig, layers: int, *, tokens: int, masked: float, item: int, fused: bool) -> float:
    """What autograd keeps of one micro-batch.

    Per token a block keeps its input, QKV (3), context, two residual sums and the normed value (D each), and the
    feed-forward layer twice, before and after GELU: 8*D + 2*F items. A dropout that no kernel makes again keeps a byte
    per element. Of the last block all but input, QKV and context are of predicted tokens only; fused kernels make
    its queries and context of these alone too. The embeddings' sum is kept where no kernel makes it again.
    """
    width, inner = config.hidden_size, config.intermediate_size
    every = 4 * width  # input and QKV
    later = 4 * width + 2 * inner
    masks = 0 if fused else 2 * width * bool(config.dropout)
    if config.gradient_checkpointing:
        inputs = 2 if fused and config.norm == "pre" else 1  # the residual, and its norm from the block before
        blocks: float = layers * tokens * inputs * width * item + tokens * ((every + later) * item + masks)
    else:
        whole = (layers - 1) * tokens * ((every + later) * item + masks)
        all_tokens, predicted = (every - width, later + width) if fused else (every + width, later)
        last = tokens * all_tokens * item + masked * (predicted * item + masks)
        blocks = whole + last
    if not fused:
        scores = config.vocab_size * (item + 4)
    elif masked * config.vocab_size * item <= KEPT_BYTES:
        scores = config.vocab_size * item
    else:
        scores = min(config.vocab_size, SLICE) * item
    embeddings = 0 if fused and config.norm == "post" else tokens * width * item
    return blocks + embeddings + masked * (5 * width * item + scores)
