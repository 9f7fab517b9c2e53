"""A checkpoint grown without engines, against the same growth in a dictionary."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from ds_stacking.checkpoint.offline import CheckpointState
from ds_stacking.checkpoint.select import newest_valid
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.executor import execute
from ds_stacking.growth.plan import make_plan
from ds_stacking.growth.state import KINDS, FullState
from tests.checkpoint.stores import IDENTITY, NUMELS, Shard, equal, random_state, save, stored
from tests.growth.simulated import run_threads


def grown_plan(parameters):
    blocks = find_block_names({name: (info.numel,) for name, info in parameters.items()})
    layers = (0, 1, 0, 1)
    return make_plan(parameters, blocks, layers, operator="stack", optimizer_state="new_reset", stage=1)


def test_growth_between_checkpoints(tmp_path) -> None:
    full = random_state(4)
    run_threads(3, lambda exchange: save(tmp_path / "small", 5, Shard(full, exchange.rank, 3), exchange))
    reader = CheckpointReader(tmp_path / "small" / "step-5")
    plan = grown_plan(reader.parameters)
    with CheckpointState(tmp_path / "big", 5, plan.parameters, extra={"from": 2}, identity=IDENTITY) as target:
        execute(plan, reader, target, OneRank())
        assert newest_valid(tmp_path / "big") is None
        path = target.publish()

    expected = FullState({entry.target: entry.info.numel for entry in plan.entries})
    for kind in KINDS:
        for name in expected.numels:
            copied = name.startswith(("blocks.2", "blocks.3"))
            source = name.replace("blocks.2", "blocks.0").replace("blocks.3", "blocks.1")
            if kind == "master" or not copied:
                expected.tensors[kind][name].copy_(full.tensors[kind][source])
    assert equal(stored(path), expected)
    found, result = newest_valid(tmp_path / "big", IDENTITY), CheckpointReader(path)
    assert (found.path, found.notes) == (path, ()) and result.extra == {"from": 2} and result.manifest.keep
    assert result.steps == {name: 0 if name.startswith(("blocks.2", "blocks.3")) else 5 for name in expected.numels}
    assert result.generators(0, 1) is None


def test_what_is_not_published_leaves_nothing(tmp_path) -> None:
    parameters = CheckpointReader(save(tmp_path / "small", 1)).parameters
    with pytest.raises(ZeroDivisionError), CheckpointState(tmp_path, 2, parameters, extra={}, identity={}):
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_full_disk_shows_at_once(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parameters = CheckpointReader(save(tmp_path / "small", 1)).parameters
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        CheckpointState(tmp_path, 2, parameters, extra={}, identity={})
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_what_is_not_written_is_zero(tmp_path) -> None:
    parameters = CheckpointReader(save(tmp_path / "small", 1)).parameters
    with CheckpointState(tmp_path, 2, parameters, extra={}, identity={}) as state:
        target = state.slices()[0]
        state.write(target, "exp_avg", torch.ones(target.numel))
        state.commit(dict.fromkeys(NUMELS, 3))
        result = stored(state.publish())
    expected = FullState(NUMELS)
    expected.tensors["exp_avg"][target.name].fill_(1)
    assert equal(result, expected)
