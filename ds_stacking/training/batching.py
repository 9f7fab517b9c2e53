"""Batch arithmetic: how the tokens of one optimizer step spread over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One optimizer step: `world_size` ranks x `accumulation` micro-batches x `micro_batch_size` sequences."""

    sequence_length: int
    """Tokens of a sequence."""
    sequences: int
    """Sequences of one optimizer step over all ranks."""
    micro_batch_size: int
    """Sequences that one rank holds at a time."""
    accumulation: int
    """Micro-batches of one step on one rank."""
    world_size: int
    """Ranks."""

    def samples(self, consumed: int, rank: int) -> list[np.ndarray]:
        """Sample numbers of the micro-batches of `rank` in the step that begins after `consumed` samples.

        Over all ranks and micro-batches they are consumed..consumed+sequences, however these are laid out.
        """
        step = np.arange(consumed, consumed + self.sequences).reshape(
            self.accumulation, self.world_size, self.micro_batch_size
        )
        return list(step[:, rank])

    def describe(self) -> str:
        """The arithmetic, as printed before the start."""
        return (
            f"{self.sequences * self.sequence_length:,} tokens = {self.world_size} ranks x {self.accumulation} "
            f"micro-batches x {self.micro_batch_size} sequences x {self.sequence_length} tokens"
        )


def plan_batch(config: RunConfig, stage: StageConfig, world_size: int) -> BatchPlan:
    """The batch of a stage: the largest micro-batch within the limit that divides a rank's share; "auto" is no limit.

    Raises UserError where the sequences of a step do not divide by the ranks.
    """
    length = config.length_of(stage)
    tokens = stage.tokens_per_step or config.tokens_per_step
    sequences = tokens // length
    if sequences % world_size:
        lower, upper = (sequences // world_size) * world_size, -(-sequences // world_size) * world_size
        nearest = " or ".join(f"{n * length:,}" for n in (lower, upper) if n)
        raise UserError(
            f"tokens_per_step {tokens:,} are {sequences} sequences of {length}, which {world_size} ranks cannot "
            f"share equally; {nearest} tokens would do."
        )
    share = sequences // world_size
    asked = stage.micro_batch_size or config.micro_batch_size
    limit = share if asked == "auto" else min(asked, share)
    micro = max(size for size in range(1, limit + 1) if share % size == 0)
    return BatchPlan(
        sequence_length=length,
        sequences=sequences,
        micro_batch_size=micro,
        accumulation=share // micro,
        world_size=world_size,
    )
