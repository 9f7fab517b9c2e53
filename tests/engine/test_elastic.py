"""A growth that changes ZeRO stage, micro-batch and accumulation: the loss curve is that of the unchanged run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_stacking.engine.stage_manager import StageManager
from tests.engine.tiny import SEED, factory, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

PATHS = {
    "unchanged": ((1, 1), (1, 1), (1, 1)),
    "up": ((1, 1), (2, 2), (3, 3)),
    "down": ((3, 2), (0, 1), (2, 6)),
}
"""ZeRO stage and accumulation of each stage; the global batch stays."""


def curve(path: tuple) -> list[float]:
    manager = StageManager(factory(path[0][0]), seed=SEED)
    manager.start(spec(2, path[0][1]))
    losses = train(manager, 0, 4)
    for i, (zero_stage, accumulation) in enumerate(path[1:], start=1):
        manager.grow(replace(spec(2**i * 2, accumulation), zero_stage=zero_stage), optimizer_state="new_reset")
        assert manager.engine.zero_optimization_stage() == zero_stage
        losses += train(manager, 4 * i, 4)
    manager.close()
    return losses


def curves() -> dict[str, list[float]]:
    return {name: curve(path) for name, path in PATHS.items()}


def test_zero_stage_and_micro_batch_may_change_at_a_growth() -> None:
    losses = run_ranks(2, curves)[0]
    for name in ("up", "down"):
        assert losses[name] == pytest.approx(losses["unchanged"], rel=1e-4), name
