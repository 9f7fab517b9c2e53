"""Real engines: a checkpoint of one layout in every other, and training that goes on as if never interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_stacking.checkpoint.generators import restore_generators
from ds_stacking.checkpoint.select import find_together
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.engine import release
from ds_stacking.engine.consolidate import consolidate
from ds_stacking.engine.factory import device
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.plan import make_plan
from tests.checkpoint.stores import equal, stored
from tests.engine.tiny import SEED, factory, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = [(2, True), (3, False)]
"""(ZeRO stage, bf16)"""
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
    manager._engine = manager.factory.build(spec(4), reader.parameters, initialize=False)
    manager.parameters, manager.stage = reader.parameters, reader.extra["stage"]
    blocks = find_blocks(manager.engine.module)
    layers = tuple(range(blocks.count))
    plan = make_plan(reader.parameters, blocks, layers, operator="copy", optimizer_state="stack", stage=0)
    execute(plan, reader, LiveState(manager.engine), make_exchange(device()))
    states = reader.generators(dist.get_rank(), dist.get_world_size())
    if generators and states is not None:
        restore_generators(states)
    return manager


def finish(manager: StageManager) -> tuple[dict | None, dict[str, int]]:
    """The weights on rank 0 and the step counts; the engine is freed."""
    result = consolidate(manager.engine, manager.parameters), LiveState(manager.engine).steps()
    release.release(manager.engine)
    manager._engine = None
    release.collect()
    return result


def run(folder: Path) -> dict:
    """For every layout: 3 steps, a growth, 3 steps, a save, 3 steps; then the last 3 again from the checkpoint.

    Returns whether losses, weights and step counts are equal, and for ZeRO 2 whether they are without the generators.
    """
    outcome = {}
    for zero_stage, bf16 in LAYOUTS:
        place, options = folder / f"{zero_stage}-{bf16}", {"bf16": bf16, "dropout": 0.2}
        manager = StageManager(factory(zero_stage, **options), seed=SEED)
        manager.start(spec(2))
        torch.manual_seed(SEED + dist.get_rank())
        train(manager, 0, 3)
        manager.grow(spec(4), optimizer_state="new_reset")
        train(manager, 3, 3)
        writer = save(manager, place, 6)
        expected = train(manager, 6, 3)  # while the checkpoint is written
        assert writer.wait()
        weights, steps = finish(manager)
        for generators in (True, False) if zero_stage == 2 else (True,):
            resumed = resume(place, zero_stage, generators=generators, **options)
            losses = train(resumed, 6, 3)
            found, found_steps = finish(resumed)
            equal_weights = weights is None or all(torch.equal(weights[name], found[name]) for name in weights)
            outcome[zero_stage, bf16, generators] = (losses == expected, equal_weights, steps == found_steps)
    return outcome


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("engines")
    return folder, run_ranks(2, run, folder)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(written, layout) -> None:
    assert written[1][*layout, True] == (True, True, True)


def test_without_the_generators_it_is_not(written) -> None:
    assert written[1][2, True, False] == (False, False, True)


def load_and_save(folder: Path, copies: Path, zero_stages: tuple[int, ...]) -> list[dict[str, int]]:
    """Load the checkpoint of ZeRO 2 under other ZeRO stages, and save it again from there."""
    steps = []
    for zero_stage in zero_stages:
        manager = resume(folder, zero_stage, bf16=True)
        assert save(manager, copies / f"{zero_stage}-{dist.get_world_size()}", 6).wait()
        steps.append(finish(manager)[1])
    return steps


@pytest.mark.parametrize(("world_size", "zero_stages"), [(1, (3,)), (3, (3,))])
def test_any_layout_reads_it_to_the_bit(written, tmp_path, world_size, zero_stages) -> None:
    source = written[0] / "2-True"
    steps = run_ranks(world_size, load_and_save, source, tmp_path, zero_stages)[0]
    original = CheckpointReader(source / "step-6")
    assert set(original.steps.values()) == {3, 6} and original.manifest.world_size == 2
    for found, zero_stage in zip(steps, zero_stages, strict=True):
        copy = tmp_path / f"{zero_stage}-{world_size}" / "step-6"
        assert equal(stored(copy), stored(source / "step-6")) and found == original.steps
        assert CheckpointReader(copy).parameters == original.parameters
