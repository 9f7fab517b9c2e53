"""Batch arithmetic: every sample once, whatever the layout; what cannot be shared is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.training.batching import plan_batch


def stage(**fields: int) -> StageConfig:
    return StageConfig(layers=2, steps=1, **fields)


@given(
    world_size=st.integers(1, 16), share=st.integers(1, 200), limit=st.integers(1, 64), consumed=st.integers(0, 10**12)
)
def test_ranks_and_micro_batches_hold_every_sample_once(
    world_size: int, share: int, limit: int, consumed: int
) -> None:
    config = RunConfig(tokens_per_step=64 * share * world_size, micro_batch_size=limit)
    plan = plan_batch(config, stage(), world_size)
    samples = [plan.samples(consumed, rank) for rank in range(world_size)]
    assert all(len(rank) == plan.accumulation for rank in samples)
    assert all(len(micro) == plan.micro_batch_size <= limit for rank in samples for micro in rank)
    everything = np.sort(np.concatenate([np.concatenate(rank) for rank in samples]))
    assert np.array_equal(everything, np.arange(consumed, consumed + plan.sequences))


@given(share=st.integers(1, 500), limit=st.integers(1, 64))
def test_the_micro_batch_is_the_largest_that_fits(share: int, limit: int) -> None:
    plan = plan_batch(RunConfig(tokens_per_step=64 * share, micro_batch_size=limit), stage(), 1)
    assert share % plan.micro_batch_size == 0
    assert not any(share % size == 0 for size in range(plan.micro_batch_size + 1, min(limit, share) + 1))


def test_a_stage_has_a_batch_of_its_own() -> None:
    config = RunConfig(tokens_per_step=2048, micro_batch_size=32)
    plan = plan_batch(config, stage(tokens_per_step=4096, micro_batch_size=8), 2)
    assert (plan.sequences, plan.micro_batch_size, plan.accumulation) == (64, 8, 4)
    assert plan.describe() == "4,096 tokens = 2 ranks x 4 micro-batches x 8 sequences x 64 tokens"


@pytest.mark.parametrize(("tokens", "nearest"), [(2048, "1,920 or 2,112"), (64, "192")])
def test_a_batch_that_ranks_cannot_share_is_refused(tokens: int, nearest: str) -> None:
    config = RunConfig(tokens_per_step=tokens)
    with pytest.raises(UserError, match=f"which 3 ranks cannot share equally; {nearest} tokens would do"):
        plan_batch(config, stage(), 3)
    for text in nearest.split(" or "):
        assert plan_batch(RunConfig(tokens_per_step=int(text.replace(",", ""))), stage(), 3).world_size == 3


def test_a_stage_has_a_sequence_length_of_its_own() -> None:
    config = RunConfig(tokens_per_step=2048, stages=[stage(), stage(sequence_length=256)])
    assert isinstance(config.stages, list)
    plans = [plan_batch(config, part, 2) for part in config.stages]
    assert [(plan.sequence_length, plan.sequences) for plan in plans] == [(64, 32), (256, 8)]
    with pytest.raises(UserError, match="8 sequences of 256, which 3 ranks cannot share"):
        plan_batch(config, config.stages[1], 3)
