"""State on a GPU: copied out through page-locked memory before it changes, generators included."""

from __future__ import annotations

import json

import pytest
import torch

from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.checkpoint.snapshot import Snapshot
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.generators import capture_generators, restore_generators
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.state import KINDS, FullState
from tests.checkpoint.stores import IDENTITY, PARAMETERS, equal, random_state, stored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(state: FullState) -> FullState:
    state.tensors = {k: {name: t.cuda() for name, t in tensors.items()} for k, tensors in state.tensors.items()}
    return state


def test_the_state_at_the_time_of_the_call_is_stored(tmp_path) -> None:
    live = on_gpu(random_state(1))
    writer = CheckpointWriter(tmp_path, OneRank(), identity=IDENTITY)
    for step in (1, 2):
        writer.save(step, live, PARAMETERS, extra={})
        for kind in KINDS:
            for values in live.tensors[kind].values():
                values.add_(1)
        assert writer.wait()
    assert Snapshot().take(live, PieceFile(live.slices())).is_pinned()
    first, expected = stored(tmp_path / "step-1"), random_state(1)
    assert equal(first, expected)
    for kind in KINDS:
        for values in expected.tensors[kind].values():
            values.add_(1)
    assert equal(stored(tmp_path / "step-2"), expected)


def test_the_generator_repeats_to_the_bit() -> None:
    torch.cuda.manual_seed(3)
    torch.rand(7, device="cuda")
    saved = json.dumps(capture_generators())
    expected = torch.randn(9, device="cuda")
    assert not torch.equal(torch.randn(9, device="cuda"), expected)
    restore_generators(json.loads(saved))
    assert torch.equal(torch.randn(9, device="cuda"), expected)
