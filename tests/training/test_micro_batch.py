"""Micro-batch "auto": which size wins, that ranks agree when one runs out of memory, that a resumption keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_stacking.config import ModelConfig, RunConfig, StageConfig
from ds_stacking.data.batches import Batch
from ds_stacking.models.bert import Bert
from ds_stacking.training.batching import plan_batch
from ds_stacking.training.micro_batch import (
    choose_micro_batches,
    fastest,
    recorded_micro_batches,
    seconds_of_a_pass,
    sizes_to_try,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("share", "sizes"), [(1, [1]), (32, [1, 2, 4, 8, 16, 32]), (12, [1, 2, 3, 6, 12]), (7, [1, 7])]
)
def test_sizes_divide_the_share(share: int, sizes: list[int]) -> None:
    assert sizes_to_try(share) == sizes


@pytest.mark.parametrize(
    ("rates", "chosen", "tried"),
    [
        ({1: 1, 2: 2, 4: 4, 8: 8}, 8, [1, 2, 4, 8]),
        ({1: 1, 2: 3, 4: 2, 8: 9}, 8, [1, 2, 4, 8]),  # one slower size may be noise
        ({1: 5, 2: 4, 4: 3, 8: 9}, 1, [1, 2, 4]),  # two are a trend
        ({1: 1, 2: 2, 4: 0, 8: 9}, 2, [1, 2, 4]),  # memory is full
        ({1: 0, 2: 1}, 1, [1]),  # not even one fits: the run itself will say so
    ],
)
def test_the_fastest_that_fits_wins(rates: dict[int, float], chosen: int, tried: list[int]) -> None:
    asked = []

    def rate(size: int) -> float:
        asked.append(size)
        return rates[size]

    assert fastest(rate, list(rates)) == chosen
    assert asked == tried


def config(folder: str) -> RunConfig:
    stages = [StageConfig(layers=1, steps=1), StageConfig(layers=2, steps=1)]
    stages.append(StageConfig(layers=2, steps=1, micro_batch_size=2))
    model = ModelConfig(hidden_size=16, num_heads=1, vocab_size=50)
    return RunConfig(stages=stages, model=model, micro_batch_size="auto", tokens_per_step=64 * 32, output_dir=folder)


def read(_: int, indices: np.ndarray) -> Batch:
    ids = torch.ones(len(indices), 64, dtype=torch.int64)
    positions = torch.arange(len(indices)) * 64
    return Batch(input_ids=ids, masked_positions=positions, labels=positions * 0, is_mask=positions == 0)


def choose(folder: str) -> dict[str, Any]:
    """Times are made up: larger is faster; the second rank has no memory for more than 4 sequences of 2 layers."""
    asked, cpu = config(folder), torch.device("cpu")

    def seconds(model: Bert, batch: Batch, device: torch.device) -> float:
        assert seconds_of_a_pass(model, batch, device) > 0  # the real passes run
        size = len(batch.input_ids)
        if dist.get_rank() == 1 and len(model.blocks) == 2 and size > 4:
            raise torch.OutOfMemoryError("made up")
        return size**0.5

    def build(layers: int, initialize: bool) -> Bert:
        return Bert(asked.model, layers, initialize=initialize)

    made = choose_micro_batches(asked, build, read, zero_stage=2, bf16=False, device=cpu, measure=seconds)
    before = recorded_micro_batches(asked, cpu)
    if dist.get_rank() == 0:
        Path(folder, "config.json").write_text(json.dumps(made.to_dict()))
    after = recorded_micro_batches(asked, cpu)
    return {
        "sizes": [stage.micro_batch_size for stage in made.stages],
        "largest": made.micro_batch_size,
        "before": before,
        "recorded": after == made,
        "shares": [
            plan.micro_batch_size * plan.accumulation for plan in (plan_batch(made, s, 2) for s in made.stages)
        ],
    }


@pytest.mark.distributed
def test_ranks_agree_and_a_resumption_keeps_the_sizes(tmp_path: Path) -> None:
    first, second = run_ranks(2, choose, str(tmp_path))
    assert first == second
    assert first["sizes"] == [16, 4, 2] and first["largest"] == 16  # 16 is a rank's whole share
    assert first["before"] is None and first["recorded"]
    assert first["shares"] == [16, 16, 16]
