"""What a growth leaves behind: nothing of the old engine, after twenty growths as after one, and after a failure."""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_stacking.common.errors import UserError
from ds_stacking.engine import handover
from ds_stacking.engine.release import release, state_references, warn_of_leaks
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from tests.engine.footprint import footprint
from tests.engine.tiny import SEED, factory, replaced, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

GROWTHS = {0: 3, 1: 3, 2: 3, 3: 20}
"""By ZeRO stage; stage 3 leaves most behind: hooks on every module, and the module itself in a list of DeepSpeed's."""


def start(zero_stage: int, **options) -> StageManager:
    memory = options.pop("growth_memory", "normal")
    manager = StageManager(factory(zero_stage, **options), seed=SEED, growth_memory=memory)
    manager.start(spec(2))
    train(manager, 0, 1)
    return manager


def many_growths() -> dict[int, list[dict[str, int]]]:
    """What is alive after the first growth and after the last, by ZeRO stage; a step is made after each."""
    results = {}
    for zero_stage, growths in GROWTHS.items():
        manager = start(zero_stage, bf16=zero_stage % 2 == 0)
        counts = []
        for i in range(growths):
            manager.grow(spec(2))
            train(manager, i, 1)
            if i in (0, growths - 1):
                counts.append(asdict(footprint()))
        manager.close()
        results[zero_stage] = counts
    return results


@pytest.mark.slow
def test_many_growths_leave_as_much_alive_as_one() -> None:
    for zero_stage, (first, last) in run_ranks(2, many_growths)[0].items():
        assert first == last, zero_stage
        assert first["parameters"] == 34 and (first["hooks"] > 0 or zero_stage == 0)


def leaking() -> tuple[int, list[str], int]:
    """A growth while this program holds the old optimizer's tensors."""
    manager = start(1)
    mine = LiveState(manager.engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = manager.grow(spec(2))
    messages = [str(warning.message) for warning in caught if "still in memory" in str(warning.message)]
    clean = manager.grow(spec(2)).leaked_bytes
    assert mine.fragments
    manager.close()
    return record.leaked_bytes, messages, clean


def test_an_old_engine_that_is_held_is_warned_of() -> None:
    leaked, messages, clean = run_ranks(1, leaking)[0]
    assert leaked > 0 and clean == 0
    assert len(messages) == 1 and f"{leaked:,} bytes" in messages[0]


def low_memory() -> dict:
    """Losses with the state parked, after a failure too, and what was alive when the new model was built."""
    results = {}
    for zero_stage in (0, 1, 3):
        losses = {}
        for memory in ("normal", "low", "failing"):
            manager = start(zero_stage, growth_memory="normal" if memory == "normal" else "low")
            watched, alive = state_references(manager.engine), []
            inner = manager.factory.build_model

            def build_model(layers, initialize, inner=inner, watched=watched, alive=alive):
                gc.collect()
                alive.append(sum(t.untyped_storage().nbytes() for r in watched if (t := r()) is not None))
                return inner(layers, initialize)

            object.__setattr__(manager.factory, "build_model", build_model)
            if memory == "failing":
                with replaced(handover, "execute", failing_once()), pytest.raises(RuntimeError, match="on purpose"):
                    manager.grow(spec(4))
            results["alive", zero_stage, memory] = alive[0] if alive else 0
            values = train(manager, 1, 2)
            manager.grow(spec(4))
            losses[memory] = values + train(manager, 3, 3)
            manager.close()
        results["losses", zero_stage] = losses
    return results


def failing_once():
    calls = []

    def execute_or_fail(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("on purpose")
        return execute(*args, **options)

    return execute_or_fail


def test_with_low_memory_the_old_engine_is_freed_first_and_restored_after_a_failure() -> None:
    results = run_ranks(2, low_memory)[0]
    for zero_stage in (0, 1, 3):
        losses = results["losses", zero_stage]
        assert losses["normal"] == losses["low"] == losses["failing"], zero_stage
        assert results["alive", zero_stage, "failing"] == 0


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages made while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves(args)
            if isinstance(t, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes()
                self.count(size)
                weakref.finalize(tensor, self.count, -size)
        return result

    def count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_of_moving() -> dict[int, tuple[int, int]]:
    """Peak bytes that moving the state takes beyond the two engines, and one block's bytes, by ZeRO stage."""
    results = {}
    for zero_stage in (1, 2, 3):
        manager = start(zero_stage)
        plan = manager.plan(4, "interleave", "stack")
        new = manager.factory.build(spec(4), plan.parameters, initialize=False)
        old_state, new_state = LiveState(manager.engine), LiveState(new)
        with PeakBytes() as peak:
            execute(plan, old_state, new_state, make_exchange(torch.device("cpu")))
        block = 12 * sum(entry.info.numel for entry in plan.entries if entry.block == 0)
        results[zero_stage] = (peak.peak, block)
        release(new)
        manager.close()
    return results


def test_moving_takes_no_more_memory_than_one_block() -> None:
    for rank in run_ranks(2, peak_of_moving):
        for zero_stage, (peak, block) in rank.items():
            assert 0 < peak <= 1.1 * block, zero_stage


def not_finite() -> tuple[str, list[float], list[float]]:
    """A growth refused for a NaN on the other rank, in both ways; then the run goes on as one that did not try."""
    losses, message = {}, ""
    for tries in (False, True):
        manager = start(2, growth_memory="low")
        if tries:
            state = LiveState(manager.engine)
            values = state.read(state.slices()[-1], "exp_avg_sq")
            kept, values[0] = values[0].item(), float("nan")
            try:
                manager.grow(spec(4))
            except UserError as error:
                message = str(error)
            values[0] = kept
            del state, values
        losses[tries] = train(manager, 1, 2)
        manager.close()
    return message, losses[False], losses[True]


def test_a_state_with_a_nan_is_refused_before_anything_is_freed() -> None:
    results = run_ranks(2, not_finite)
    assert any("(exp_avg_sq)" in message for message, *_ in results)
    assert all("NaN" in message for message, *_ in results)
    for _, without, with_refusal in results:
        assert without == with_refusal


def test_warn_of_leaks_is_silent_where_nothing_is_held() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_of_leaks([]) == 0
