"""The weights of the forward pass are the masters' own after a growth and a restore, or the growth fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from ds_stacking.engine import zero_state
from ds_stacking.engine.factory import device
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.working_copies import verify_working_copies
from ds_stacking.engine.zero_state import LiveState, refresh_working_copies
from ds_stacking.growth.exchange import make_exchange
from tests.engine.tiny import SEED, factory, replaced, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = [(stage, bf16) for stage in range(4) for bf16 in (False, True)]
WEIGHTS = ("embeddings.word.weight", "final_norm.bias")
"""One that ZeRO 3 partitions, and one that it leaves whole on every rank."""


def fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError as error:
        assert "not those of the optimizer's fp32 masters" in str(error)
        return True
    return False


def damaged(manager: StageManager, name: str, rank: int) -> bool:
    """Whether it is noticed on this rank that `rank` has another bit in its copy of the last element of a weight."""
    parameter = dict(manager.engine.module.named_parameters())[name]
    held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") and not parameter.ds_persist else parameter
    last = held.detach().view(-1)[-1:]
    kept = last.clone()
    if dist.get_rank() == rank:
        last += 1
    state = LiveState(manager.engine)
    noticed = fails(lambda: verify_working_copies(state, make_exchange(device())))
    last.copy_(kept)
    return noticed


def verified() -> dict:
    results = {}
    for zero_stage, bf16 in LAYOUTS:
        manager = StageManager(factory(zero_stage, bf16=bf16), seed=SEED)
        manager.start(spec(2))
        train(manager, 0, 1)
        state, exchange = LiveState(manager.engine), make_exchange(device())
        found = {"right": fails(partial(verify_working_copies, state, exchange))}
        if zero_stage or bf16:  # else the weights are the masters
            for rank in range(3):
                found |= {(name, rank): damaged(manager, name, rank) for name in WEIGHTS}
        if bf16:
            with replaced(zero_state, "refresh_working_copies", lambda engine: None):
                found["growth without refreshing"] = fails(partial(manager.grow, spec(4)))
        found["trains on"] = train(manager, 1, 1)[0]
        del state
        manager.close()
        results[zero_stage, bf16] = found
    return results


def test_a_wrong_copy_on_any_rank_is_noticed_on_all() -> None:
    for results in run_ranks(3, verified):
        for layout, found in results.items():
            assert not found.pop("right") and found.pop("trains on") > 0, layout
            assert all(found.values()), (layout, found)


def refreshed() -> bool:
    """Whether both ways to refresh the copies under ZeRO 1 and 2 give the same weights, from weights that differ."""
    same = True
    for zero_stage in (1, 2):
        manager = StageManager(factory(zero_stage, bf16=True), seed=SEED)
        engine = manager.start(spec(2))
        weights = []
        for refresh in (partial(refresh_working_copies, engine), engine.optimizer.update_lp_params):
            for flat in engine.optimizer.bit16_groups_flat:
                flat.zero_()
            refresh()
            weights.append(torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()]))
        same &= torch.equal(*weights) and bool(weights[0].any())
        release(engine)
        collect()
    return same


def test_broadcasts_refresh_as_deepspeed_does() -> None:
    assert all(run_ranks(3, refreshed))
