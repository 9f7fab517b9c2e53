"""One rank fails in a growth: all ranks know, and go on with the engine before it; or all end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_stacking.common.errors import OtherRankFailed
from ds_stacking.engine import agreement, handover
from ds_stacking.engine.agreement import CollectiveDeadlock, all_ranks_or_none
from ds_stacking.engine.factory import EngineFactory
from ds_stacking.engine.stage_manager import StageManager
from tests.engine import tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def on_rank_1(original: Callable[..., Any], call: int, error: type[Exception]) -> Callable[..., Any]:
    """`original`, of which one call fails on rank 1 as where memory is short."""
    calls = itertools.count(1)

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == call and dist.get_rank() == 1:
            raise error("no memory on purpose")
        return original(*args, **options)

    return failing


PLACES = {
    "the check": (handover, "check_finite", 1, torch.OutOfMemoryError, "normal"),
    "memory of the grown engine": (EngineFactory, "try_memory", 1, torch.OutOfMemoryError, "normal"),
    "the model": (tiny, "Bert", 1, MemoryError, "normal"),
    "its optimizer's state": (handover, "LiveState", 2, torch.OutOfMemoryError, "normal"),
    "the host's copy": (handover, "ParkedState", 1, MemoryError, "low"),
    "memory, the old engine freed": (EngineFactory, "try_memory", 1, torch.OutOfMemoryError, "low"),
    "the optimizer's state, the old engine freed": (handover, "LiveState", 2, torch.OutOfMemoryError, "low"),
}
"""What fails: where, in which call, with what, under which `growth_memory`."""


def start(memory: str) -> StageManager:
    manager = StageManager(tiny.factory(2), seed=tiny.SEED, growth_memory=memory)
    manager.start(tiny.spec(2))
    return manager


def one_fails() -> dict[str, Any]:
    """By place: what this rank met, how soon, and the losses of going on and of the growth that comes after all."""
    results: dict[str, Any] = {}
    for name, (owner, what, call, error, memory) in PLACES.items():
        manager = start(memory)
        losses = tiny.train(manager, 0, 2)
        begin = time.monotonic()
        failing = on_rank_1(getattr(owner, what), call, error)
        with tiny.replaced(owner, what, failing), pytest.raises((OtherRankFailed, error)) as met:
            manager.grow(tiny.spec(4))
        seconds = time.monotonic() - begin
        losses += tiny.train(manager, 2, 2)
        manager.grow(tiny.spec(4))
        results[name] = (type(met.value).__name__, str(met.value), seconds, losses + tiny.train(manager, 4, 1))
        manager.close()
    return results


def test_all_ranks_go_on_with_the_engine_before() -> None:
    first, second = run_ranks(2, one_fails)
    assert first.keys() == second.keys() == PLACES.keys()
    assert len({tuple(losses) for *_, losses in first.values()}) == 1, "something is left of a growth that failed"
    for name in PLACES:
        kind, words, seconds, _ = first[name]
        assert kind == "OtherRankFailed" and words.count("failed while") == 1, name
        assert words.startswith("rank 1 failed while") and words.endswith("no memory on purpose"), name
        assert seconds < 10 and second[name][0] in ("OutOfMemoryError", "MemoryError"), name


def others_wait() -> tuple[str, float]:
    """Rank 1 fails where rank 0 waits for it in a collective call."""
    begin = time.monotonic()
    with tiny.replaced(agreement, "PATIENCE", 2.0), pytest.raises(RuntimeError) as met, all_ranks_or_none("working"):
        if dist.get_rank() == 1:
            raise MemoryError("on purpose")
        dist.all_reduce(torch.ones(1))
    seconds = time.monotonic() - begin
    if dist.get_rank() == 1:
        dist.all_reduce(torch.ones(1))  # lets the other go
    return f"{type(met.value).__name__}: {met.value}", seconds


def test_where_the_others_wait_in_a_collective_call_nobody_goes_on() -> None:
    (first, _), (second, seconds) = run_ranks(2, others_wait)
    assert second.startswith(CollectiveDeadlock.__name__) and "1 ranks wait for it" in second and seconds < 5
    assert first.startswith("CollectiveDeadlock: rank 1 failed while working: MemoryError: on purpose")


def devices_wait() -> tuple[str, float]:
    """Rank 1 fails where the device of rank 0 waits for it, as under NCCL, and not its host."""
    begin = time.monotonic()
    works = []

    def collective() -> None:
        works.append(dist.all_reduce(torch.ones(1), async_op=True))

    def work() -> Callable[[], bool]:
        return lambda: all(asked.is_completed() for asked in works)

    with (
        tiny.replaced(agreement, "PATIENCE", 2.0),
        tiny.replaced(agreement, "device_work", work),
        pytest.raises(RuntimeError) as met,
        all_ranks_or_none("working"),
    ):
        if dist.get_rank() == 1:
            raise MemoryError("on purpose")
        collective()
    seconds = time.monotonic() - begin
    if dist.get_rank() == 1:
        dist.all_reduce(torch.ones(1))
    return f"{type(met.value).__name__}: {met.value}", seconds


def test_where_their_devices_wait_nobody_goes_on_either() -> None:
    for said, seconds in run_ranks(2, devices_wait):
        assert (
            said.startswith("CollectiveDeadlock: rank 1 failed while working: MemoryError: on purpose; 1 ranks wait")
            and seconds < 5
        )
