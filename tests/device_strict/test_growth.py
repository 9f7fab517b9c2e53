"""Training, growth, the look after it, checkpoint, restore and consolidation on the double of a GPU, on 3, 4 and 8 ranks.

The same is done without the double: losses must be equal to the bit.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_stacking.checkpoint.select import find_together
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.engine.consolidate import consolidate
from ds_stacking.engine.factory import device
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth import executor, similarity
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import Ranks, make_exchange
from ds_stacking.growth.state import StateReader
from tests.device_strict.double import Refused, strict_device
from tests.engine.tiny import SEED, factory, replaced, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "zero 0": (0, {}),
    "zero 0, bf16": (0, {"bf16": True}),
    "zero 1, bf16": (1, {"bf16": True}),
    "zero 2": (2, {}),
    "zero 2, bf16": (2, {"bf16": True}),
    "zero 2, offload": (2, {"offload": True}),
    "zero 3": (3, {}),
    "zero 3, bf16": (3, {"bf16": True}),
}


def life(layout: str, memory: str, folder: Path) -> dict[str, Any]:
    """Train, grow, look at the blocks, train, save, restore, train, consolidate; what came out."""
    zero_stage, options = LAYOUTS[layout]
    manager = StageManager(factory(zero_stage, **options), seed=SEED, growth_memory=memory)
    manager.start(spec(2))
    losses = train(manager, 0, 2)
    record = manager.grow(spec(4))
    state, exchange = LiveState(manager.engine), make_exchange(device())
    likeness = similarity.cosines(
        state, manager.parameters, find_blocks(manager.engine.module), {2: 0, 3: 1}, exchange
    )
    losses += train(manager, 2, 2)
    writer = CheckpointWriter(folder, exchange, identity={}, asynchronous=False)
    writer.save(4, LiveState(manager.engine), manager.current_parameters(), extra={})
    writer.close()
    del state
    release(manager.engine)
    collect()
    found = find_together(folder, exchange)
    assert found is not None
    reader = CheckpointReader(found.path)
    manager.restore(spec(4), reader.parameters, reader, stage=1)
    losses += train(manager, 4, 1)
    full = consolidate(manager.engine, manager.parameters)
    release(manager.engine)
    collect()
    return {
        "losses": losses,
        "verified": record.tensors_verified > 0,
        "alike": [round(value or 0, 6) for value in likeness["master"].values()],
        "sum": None if full is None else float(sum(tensor.double().sum() for tensor in full.values())),
    }


def lives(layouts: list[str], folder: str) -> dict[str, Any]:
    """Every layout on the double and, without `low`, off it."""
    results = {}
    for layout in layouts:
        for memory in ("normal", "low"):
            place = Path(folder) / f"{layout} {memory}"
            with strict_device(dist.get_rank()):
                results[layout, memory] = life(layout, memory, place)
        results[layout, "plain"] = life(layout, "normal", Path(folder) / f"{layout} plain")
    return results


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_a_run_of_every_layout_on_a_gpu_equals_the_one_on_the_host(world_size: int, tmp_path: Path) -> None:
    layouts = list(LAYOUTS) if world_size == 4 else ["zero 1, bf16", "zero 2", "zero 3, bf16"]
    for rank, results in enumerate(run_ranks(world_size, lives, layouts, str(tmp_path))):
        for layout in layouts:
            plain = results[layout, "plain"]
            assert results[layout, "normal"] == plain and results[layout, "low"] == plain, layout
            assert plain["verified"] and plain["alike"] == [1.0, 1.0]
            assert (plain["sum"] is not None) == (rank == 0)
