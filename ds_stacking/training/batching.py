"""Batches: how the tokens of one optimizer step spread over ranks and micro-batches, and the steps made ahead."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.data.batches import Batch, MaskedBatches
from ds_stacking.data.prefetch import prefetch
from ds_stacking.engine.factory import EngineSpec
from ds_stacking.training.state import Position


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


def engine_spec(stage: StageConfig, plan: BatchPlan) -> EngineSpec:
    """The engine of a stage."""
    return EngineSpec(
        layers=stage.layers,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.accumulation,
        zero_stage=stage.zero_stage,
    )


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What an optimizer step of this rank learns from, on the host."""

    micro_batches: list[Batch]
    """In the order in which they are used."""
    counts: Tensor
    """Predicted tokens, pairs that see each other of all tokens and of these, whether to stop: [4] int64."""


def stream_steps(
    source: MaskedBatches, plan: BatchPlan, position: Position, steps: int, device: torch.device
) -> Generator[StepBatches]:
    """This rank's micro-batches of the next `steps` steps, made ahead in the background."""
    start, rank = position.samples, dist.get_rank()
    others = start - position.by_length.get(str(plan.sequence_length), 0)  # samples of other lengths

    def make_step(samples: list[np.ndarray]) -> StepBatches:
        batches = [source.batch(indices, others) for indices in samples]
        counts = torch.tensor([(len(batch.labels), *batch.pairs, 0) for batch in batches]).sum(0)
        if device.type == "cuda":  # from page-locked memory a copy need not block
            batches, counts = [batch.pin_memory() for batch in batches], counts.pin_memory()
        return StepBatches(micro_batches=batches, counts=counts)

    return prefetch(make_step, (plan.samples(start + i * plan.sequences, rank) for i in range(steps)))
