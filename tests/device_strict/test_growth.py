"""Training, growth, the look after it, checkpoint, restore and consolidation on the double of a GPU, on 3, 4, 8 ranks.

What the tests of engines cannot see, since on CPUs the engine's device and the host's are one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.checkpoint.select import find_together
from ds_stacking.checkpoint.snapshot import Snapshot
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.engine import zero_state
from ds_stacking.engine.consolidate import gather_masters
from ds_stacking.engine.factory import device
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth import similarity
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import Ranks, make_exchange
from ds_stacking.growth.state import KINDS, StateReader
from tests.device_strict.double import strict_device
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
    errors = [report.error for report in writer.reports()]
    assert errors == [None], errors
    del state
    release(manager.engine)
    collect()
    found = find_together(folder, exchange)
    assert found is not None
    reader = CheckpointReader(found.path)
    manager.restore(spec(4), reader.parameters, reader, stage=1)
    losses += train(manager, 4, 1)
    full = dict(gather_masters(manager.engine, manager.parameters))
    release(manager.engine)
    collect()
    return {
        "losses": losses,
        "verified": record.tensors_verified > 0,
        "alike": [round(value or 0, 6) for value in likeness["master"].values()],
        "sum": float(sum(tensor.double().sum() for tensor in full.values())) if full else None,
    }


def lives(cases: list[tuple[str, str]], folder: str) -> dict[tuple[str, str], Any]:
    """The cases, pairs of a layout and growth_memory, on the double; "plain" is off it."""
    results = {}
    for layout, memory in cases:
        plain = memory == "plain"
        with contextlib.nullcontext() if plain else strict_device(dist.get_rank()):
            results[layout, memory] = life(layout, "normal" if plain else memory, Path(folder) / f"{layout} {memory}")
    return results


FULL = ["zero 2, bf16", "zero 3, bf16"]
FEW = [("zero 0, bf16", "low"), ("zero 1, bf16", "normal"), ("zero 2, bf16", "normal"), ("zero 3, bf16", "low")]
CASES = {
    3: [
        *((layout, memory) for layout in FULL for memory in ("normal", "low", "plain")),
        *((layout, "normal") for layout in ("zero 0", "zero 2", "zero 3")),
        *((layout, "low") for layout in ("zero 1, bf16", "zero 2, offload")),
    ],
    4: [(layout, memory) for layout in FULL for memory in ("normal", "low")],
    8: [("zero 1, bf16", "normal"), ("zero 2, bf16", "low"), ("zero 3, bf16", "normal")],
}


@pytest.mark.parametrize(
    ("world_size", "cases"), [(3, FEW), *(pytest.param(*item, marks=pytest.mark.slow) for item in CASES.items())]
)
def test_a_life_on_a_gpu(world_size: int, cases: list[tuple[str, str]], tmp_path: Path) -> None:
    """Growth is compared with its source to the bit there, in the masters and in the working copies."""
    ranks = run_ranks(world_size, lives, cases, str(tmp_path))
    for rank, results in enumerate(ranks):
        for (layout, memory), found in results.items():
            assert found["verified"] and found["alike"] == [1.0, 1.0], (layout, memory)
            assert (found["sum"] is not None) == (rank == 0)
            expected = results.get((layout, "normal"), found)
            if memory == "plain":  # operations that are watched one by one round otherwise
                assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3), layout
            else:
                assert found == expected, (layout, memory)


def all_to_all_of_host_tensors(
    self: Ranks, send: Any, receive_sizes: Any, *, dtype: torch.dtype = torch.float32
) -> list:
    """As it was: slots for ranks that get nothing filled with host tensors, then joined with parts on the device."""
    filled = [torch.cat(list(parts)) if parts else torch.empty(0, dtype=dtype) for parts in send]
    full = [part for part in filled if part.numel()]
    outgoing = (full[0] if len(full) == 1 else torch.cat(filled)).to(self.device)
    incoming = outgoing.new_empty(sum(receive_sizes))
    dist.all_to_all_single(incoming, outgoing, list(receive_sizes), [part.numel() for part in filled])
    return list(incoming.split(list(receive_sizes)))


def total_on_the_host(self: Ranks, value: int) -> int:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return int(tensor)


def state_on_the_host(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> None:
    if not optimizer.state[master]:
        zeros = {kind: torch.zeros_like(master.detach()) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[master] |= {"step": torch.tensor(0.0), **zeros}


def snapshot_as_it_lies(self: Snapshot, state: StateReader, file: PieceFile) -> torch.Tensor:
    return torch.cat([state.read(piece, kind) for kind in KINDS for piece in file.pieces])


def snapshot_pinned_like_the_state(self: Snapshot, state: StateReader, file: PieceFile) -> torch.Tensor:
    return torch.empty_like(state.read(file.pieces[0], "master"), pin_memory=True)


def look_with_host_tensors(*args: Any) -> Any:
    with replaced(Ranks, "all_to_all", all_to_all_of_host_tensors):
        return cosines(*args)


cosines = similarity.cosines
FAULTS: dict[str, tuple[Any, str, Callable, str]] = {
    "host tensors in a growth's rounds": (
        Ranks,
        "all_to_all",
        all_to_all_of_host_tensors,
        r"cat: expected .* cpu\[0\]",
    ),
    "host tensors in the look's rounds": (similarity, "cosines", look_with_host_tensors, r"cat: expected .* cpu\[0\]"),
    "host tensor in a reduction": (Ranks, "all_reduce_sum", total_on_the_host, "allreduce_: no backend type"),
    "optimizer state on the host": (zero_state, "materialise", state_on_the_host, "_fused_adamw_: expected all"),
    "device tensor written to a file": (Snapshot, "take", snapshot_as_it_lies, "convert cuda device type tensor"),
    "pinned memory on the device": (Snapshot, "reserve", snapshot_pinned_like_the_state, "cannot pin memory"),
}


def faulty(fault: str, folder: str) -> None:
    owner, name, value, _ = FAULTS[fault]
    with strict_device(dist.get_rank()), replaced(owner, name, value):
        life("zero 2", "normal", Path(folder))


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] * (number > 2)) for number, name in enumerate(FAULTS)]
)
def test_a_fault_put_back_is_caught(fault: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault][-1]):
        run_ranks(8 if "look" in fault else 3, faulty, fault, str(tmp_path))
