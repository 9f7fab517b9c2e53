"""Models that no memory holds are refused by arithmetic, and those that may fit are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig, RunConfig
from ds_stacking.models.bert import Bert
from ds_stacking.training.capacity import count_parameters, memory, refuse_what_cannot_fit

CPU = torch.device("cpu")


def ask(config: RunConfig, **zero: Any) -> None:
    refuse_what_cannot_fit(config, {"zero_optimization": {"stage": 0} | zero}, 1e9, bf16=False)


def test_the_count_is_that_of_the_model() -> None:
    model = ModelConfig(vocab_size=104, hidden_size=32)
    assert count_parameters(model, 7) == Bert(model, 7).num_parameters


def test_the_deepest_stage_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ModelConfig(hidden_size=768, num_heads=12)
    ask(RunConfig(stages="1:5,4:5", model=wide))
    with pytest.raises(
        UserError, match=r"stage 12:5 has 8\d,\d+,\d+ parameters, which take 1.7 GB .* a rank has 1.0 GB"
    ):
        ask(RunConfig(stages="1:5,12:5", model=wide))
    with pytest.raises(UserError, match="lower model.hidden_size"):
        ask(RunConfig(stages="1:5", model=ModelConfig(hidden_size=1_000_000)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    ask(RunConfig(stages="1:5,12:5", model=wide), stage=3)
    ask(RunConfig(stages="1:5,12:5", model=wide), stage=2, offload_optimizer={"device": "nvme"})


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    whole = memory(CPU, tmp_path / "none")
    for content, found in (("max\n", whole), ("1000000\n", 500_000)):
        (tmp_path / "memory.max").write_text(content)
        assert memory(CPU, tmp_path / "memory.max") == found
