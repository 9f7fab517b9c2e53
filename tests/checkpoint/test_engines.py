"""Real engines: a checkpoint of one layout in every other, and training that goes on as if never interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_stacking.checkpoint.select import find_together
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.generators import restore_generators
from ds_stacking.engine.consolidate import gather_masters
from ds_stacking.engine.factory import device
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.exchange import make_exchange
from tests.checkpoint.stores import equal, stored
from tests.engine.tiny import SEED, factory, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

BEFORE = {"zero_stage": 2, "bf16": True, "dropout": 0.2}
IDENTITY = {"model": "tiny"}


def save(manager: StageManager, folder: Path, step: int) -> CheckpointWriter:
    state = LiveState(manager.engine)
    steps = state.steps()
    parameters = {name: replace(info, step=steps[name]) for name, info in manager.parameters.items()}
    writer = CheckpointWriter(folder, make_exchange(device()), identity=IDENTITY)
    writer.save(step, state, parameters, extra={"stage": manager.stage})
    return writer


def resume(folder: Path, zero_stage: int, *, generators: bool = True, **options) -> StageManager:
    found = find_together(folder, make_exchange(device()), identity=IDENTITY)
    reader = CheckpointReader(found.path)
    manager = StageManager(factory(zero_stage, **options), seed=SEED)
    manager.restore(spec(4), reader.parameters, reader, stage=reader.extra["stage"])
    states = reader.generators(dist.get_rank(), dist.get_world_size())
    if generators and states is not None:
        restore_generators(states)
    return manager


def finish(manager: StageManager) -> tuple[dict, dict[str, int]]:
    """The weights on rank 0 and the step counts; the engine is freed."""
    result = dict(gather_masters(manager.engine, manager.parameters)), LiveState(manager.engine).steps()
    manager.close()
    return result


def run(folder: Path) -> dict[bool, tuple[bool, bool, bool]]:
    """3 steps, a growth, 3 steps, a save, 3 steps; then the last 3 again from the checkpoint.

    Returns whether losses, weights and step counts are equal, with and without the generators restored.
    """
    manager = StageManager(factory(**BEFORE), seed=SEED)
    manager.start(spec(2))
    torch.manual_seed(SEED + dist.get_rank())
    train(manager, 0, 3)
    manager.grow(spec(4), optimizer_state="new_reset")
    train(manager, 3, 3)
    writer = save(manager, folder, 6)
    expected = train(manager, 6, 3)  # while the checkpoint is written
    assert writer.wait()
    weights, steps = finish(manager)
    outcome = {}
    for generators in (True, False):
        resumed = resume(folder, generators=generators, **BEFORE)
        losses = train(resumed, 6, 3)
        found, found_steps = finish(resumed)
        equal_weights = all(torch.equal(weights[name], found[name]) for name in weights)
        outcome[generators] = (losses == expected, equal_weights, steps == found_steps)
    return outcome


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("engines")
    return folder, run_ranks(2, run, folder)[0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(written) -> None:
    assert written[1][True] == (True, True, True)


def test_without_the_generators_it_is_not(written) -> None:
    assert written[1][False] == (False, False, True)


def load_and_save(folder: Path, copies: Path, zero_stage: int, offload: bool) -> dict[str, int]:
    """Load the checkpoint of ZeRO 2 in another layout, save it again from there; the step counts that were loaded."""
    manager = resume(folder, zero_stage, offload=offload, bf16=True)
    assert save(manager, copies, 6).wait()
    return finish(manager)[1]


@pytest.mark.parametrize(("world_size", "zero_stage", "offload"), [(1, 3, False), (3, 3, False), (2, 2, True)])
def test_another_layout_reads_it_to_the_bit(written, tmp_path, world_size, zero_stage, offload) -> None:
    steps = run_ranks(world_size, load_and_save, written[0], tmp_path, zero_stage, offload)[0]
    original, copy = CheckpointReader(written[0] / "step-6"), CheckpointReader(tmp_path / "step-6")
    assert set(original.steps.values()) == {3, 6} and steps == original.steps
    assert (original.manifest.world_size, copy.manifest.world_size) == (2, world_size)
    assert copy.parameters == original.parameters and equal(stored(copy.path), stored(original.path))
