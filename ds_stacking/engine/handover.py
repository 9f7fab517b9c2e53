"""Hands a live engine's state over to a new engine, beside the old one or after parking its state on the host.

Everything that can be checked is checked before the old engine is touched, and a failure leaves a usable engine. Each
phase succeeds on all ranks or fails on all (ds_stacking.engine.agreement).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_stacking.common.errors import UserError
from ds_stacking.engine.agreement import CollectiveDeadlock, all_ranks_or_none
from ds_stacking.engine.factory import device
from ds_stacking.engine.release import collect, release, state_references, warn_of_leaks
from ds_stacking.engine.working_copies import verify_working_copies
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.checks import check_finite, check_source
from ds_stacking.growth.exchange import OneRank, make_exchange
from ds_stacking.growth.executor import MoveReport, execute
from ds_stacking.growth.holdings import holdings
from ds_stacking.growth.plan import GrowthPlan
from ds_stacking.growth.state import ParkedState, StateReader

Build = Callable[[], DeepSpeedEngine]


@dataclass(kw_only=True)
class Handover:
    """A new engine that holds the state of an old one, and what it took."""

    engine: DeepSpeedEngine
    report: MoveReport
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock by phase: check, park (low memory only), build, the executor's phases, release."""
    leaked_bytes: int = 0
    """Bytes of the old engine's state that are still in memory."""


class GrowthRolledBack(Exception):
    """A growth failed after the old engine was freed; `engine` is the old one, built anew with its parked state."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        super().__init__("the growth failed; the engine before it was restored")
        self.engine = engine


def hand_over(old: DeepSpeedEngine, plan: GrowthPlan, build: Build) -> Handover:
    """Build a new engine beside `old`, move the state as `plan` says, verify it, free `old`. Collective.

    Raises UserError before anything is touched for bad input, and whatever `build` raises; where the state of the
    new engine differs from its source it raises RuntimeError, and OtherRankFailed where it was another rank that
    failed. In each case `old` is as it was. Raises CollectiveDeadlock where no rank can go on.
    """
    seconds: dict[str, float] = {}
    source = LiveState(old)
    with _clock(seconds, "check"), all_ranks_or_none("checking the state to be grown"):
        _check(old, plan, source)
    new = None
    try:
        with _clock(seconds, "build"), all_ranks_or_none("building the grown engine"):
            new = build()
        with all_ranks_or_none("moving the state"):
            report = _move(plan, source, new)
    except CollectiveDeadlock:
        raise
    except BaseException:
        if new is not None:
            release(new)
        collect()
        raise
    _copy_counters(old.module, new, plan, _counters(old))
    with _clock(seconds, "release"):
        watched = state_references(old)
        del source
        release(old)
        leaked = warn_of_leaks(watched)
    return Handover(engine=new, report=report, seconds=seconds | report.seconds, leaked_bytes=leaked)


def hand_over_parked(
    old: DeepSpeedEngine, plan: GrowthPlan, build: Build, *, before: GrowthPlan, rebuild: Build
) -> Handover:
    """The same in less device memory: the old state is copied to the host and `old` freed before `build` is called.

    Raises UserError before anything is touched for bad input; where the rest fails on any rank, raises
    GrowthRolledBack from the error with an engine made by `rebuild`, to which the plan `before` brought the parked
    state back. Raises CollectiveDeadlock where no rank can go on.
    """
    seconds: dict[str, float] = {}
    source = LiveState(old)
    with _clock(seconds, "check"), all_ranks_or_none("checking the state to be grown"):
        _check(old, plan, source)
    with _clock(seconds, "park"):
        with all_ranks_or_none("copying the state to the host"):
            parked, counters = ParkedState(source), _counters(old)
        shell = old.module
        watched = state_references(old)
        del source
        release(old)
        collect()
    new = None
    try:
        with _clock(seconds, "build"), all_ranks_or_none("building the grown engine"):
            new = build()
        with all_ranks_or_none("moving the state"):
            report = _move(plan, parked, new)
        _copy_counters(shell, new, plan, counters)
    except CollectiveDeadlock:
        raise
    except Exception as error:
        new = None
        collect()
        with all_ranks_or_none("bringing the engine before the growth back"):
            restored = rebuild()
            _move(before, parked, restored)
        _copy_counters(shell, restored, before, counters)
        raise GrowthRolledBack(restored) from error
    return Handover(engine=new, report=report, seconds=seconds | report.seconds, leaked_bytes=warn_of_leaks(watched))


def _check(engine: DeepSpeedEngine, plan: GrowthPlan, source: LiveState) -> None:
    exchange = make_exchange(device())
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise UserError(
            f"Parameter {frozen[0]} is frozen, so the optimizer does not hold it and growth would lose it; "
            f"set requires_grad on all parameters."
        )
    names = [entry.source for entry in plan.entries if entry.source is not None]
    check_source(plan, holdings(source.slices(), dict.fromkeys(names), exchange))
    with all_ranks_or_none("looking for numbers that are not finite"):
        check_finite(source, OneRank())


def _move(plan: GrowthPlan, source: StateReader, new: DeepSpeedEngine) -> MoveReport:
    unplanned = {name for name, _ in new.module.named_parameters()} - plan.parameters.keys()
    if unplanned:
        raise UserError(
            f"The grown model has the parameter {min(unplanned)}, which the plan does not know; build it as the old "
            f"one was, only deeper."
        )
    with all_ranks_or_none("making the optimizer's state"):
        target = LiveState(new)
    exchange = make_exchange(device())
    report = execute(plan, source, target, exchange)
    verify_working_copies(target, exchange)
    return report


def _counters(engine: DeepSpeedEngine) -> dict[str, int]:
    """DeepSpeed's own counts go on; micro_steps begins anew, since the number of micro-batches may differ."""
    return {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}


def _copy_counters(old: nn.Module, new: DeepSpeedEngine, plan: GrowthPlan, counters: dict[str, int]) -> None:
    """Counters, and whether the model was training or evaluating."""
    for name, value in counters.items():
        setattr(new, name, value)
    new.train(old.training)


@contextmanager
def _clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
