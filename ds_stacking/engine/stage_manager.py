"""The stage manager: drains an engine, grows its weights and optimizer state into a new one, and goes on.

The default process group is never torn down, the data position lies outside the engine, and every random number
generator is as it was before the growth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.common.generators import isolated_generators
from ds_stacking.engine.agreement import all_ranks_or_none
from ds_stacking.engine.factory import EngineFactory, EngineSpec, device
from ds_stacking.engine.handover import GrowthRolledBack, Handover, hand_over, hand_over_parked
from ds_stacking.engine.record import GrowthRecord, growth_record
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.working_copies import verify_working_copies
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.blocks_alike import check_alike
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, copy_plan, make_plan
from ds_stacking.growth.state import ParkedState, StateReader

Evaluate = Callable[[DeepSpeedEngine], float]
INITIALISATION = frozenset({"std"})
"""Attributes of our layers that differ where weights need not be drawn, since they will be overwritten."""


class StageManager:
    """Owns the engine of the current stage and replaces it at a growth."""

    def __init__(
        self,
        factory: EngineFactory,
        *,
        seed: int = 0,
        evaluate: Evaluate | None = None,
        growth_memory: Literal["normal", "low"] = "normal",
    ) -> None:
        self.factory = factory
        self.seed = seed
        self.evaluate = evaluate
        self.growth_memory = growth_memory
        self.stage = 0
        self.parameters: dict[str, ParameterInfo] = {}
        self._engine: DeepSpeedEngine | None = None
        self._spec: EngineSpec | None = None

    @property
    def engine(self) -> DeepSpeedEngine:
        """The engine of the current stage."""
        assert self._engine is not None, "start() comes first"
        return self._engine

    def start(self, spec: EngineSpec) -> DeepSpeedEngine:
        """Build the first stage's engine, its weights drawn from the seed."""
        with all_ranks_or_none("building the first engine"), isolated_generators(self.seed):
            self._engine, self._spec = self.factory.build(spec), spec
        self.parameters = self.factory.parameter_infos(self._engine.module)
        return self._engine

    def restore(
        self, spec: EngineSpec, parameters: Mapping[str, ParameterInfo], source: StateReader, *, stage: int
    ) -> DeepSpeedEngine:
        """Build the engine of `stage` and fill it from a store, such as a checkpoint; every tensor is verified."""
        with all_ranks_or_none("building the engine to restore"), isolated_generators(self.seed):
            self._engine, self._spec = self.factory.build(spec, parameters, initialize=False), spec
        plan = copy_plan(parameters, find_blocks(self._engine.module))
        with all_ranks_or_none("restoring the state"):
            state, exchange = LiveState(self._engine), make_exchange(device())
            execute(plan, source, state, exchange)
            verify_working_copies(state, exchange)
        self.parameters, self.stage = dict(parameters), stage
        return self._engine

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Whatever is done inside, afterwards an engine with the present depth and state is the current one.

        Each rank keeps its part of the state on the host meanwhile. Where the body fails, nothing is undone.
        """
        state, parameters = ParkedState(LiveState(self.engine)), self.current_parameters()
        spec, stage = self._spec, self.stage
        assert spec is not None
        yield
        self.close()
        self.restore(spec, parameters, state, stage=stage)

    def close(self) -> None:
        """Free the current engine."""
        release(self.engine)
        collect()
        self._engine = None

    def current_parameters(self) -> dict[str, ParameterInfo]:
        """The parameters with their present step counts."""
        steps = LiveState(self.engine).steps()
        return {name: replace(info, step=steps[name]) for name, info in self.parameters.items()}

    def plan(self, layers: int, operator: str, optimizer_state: str) -> GrowthPlan:
        """The plan of a growth from the current engine, its step counts included."""
        blocks = find_blocks(self.engine.module)
        return make_plan(
            self.current_parameters(),
            blocks,
            layer_map(operator, blocks.count, layers),
            operator=operator,
            optimizer_state=optimizer_state,
            stage=self.stage + 1,
            transform=parse_operator(operator).transform,
        )

    def grow(self, spec: EngineSpec, *, operator: str = "stack", optimizer_state: str = "stack") -> GrowthRecord:
        """Grow into the engine that `spec` describes. All ranks call it together, between optimizer steps.

        Raises UserError for a depth that the operator cannot reach and for a state that is not finite, before anything
        is touched, and RuntimeError where a tensor of the new engine differs from its source, or whatever else one
        rank met while the engine was built or filled: that rank raises its own error, the others OtherRankFailed. The
        current engine is then one that goes on as if nothing had happened: the old one, or with `growth_memory` "low",
        where that had been freed, a new one with its parked state. Raises CollectiveDeadlock where ranks wait for a
        failed one in a collective call; the run must end then.
        """
        assert self.engine.micro_steps % self.engine.gradient_accumulation_steps() == 0, "in the middle of a step"
        plan = self.plan(spec.layers, operator, optimizer_state)
        before = self.evaluate(self.engine) if self.evaluate else None
        handover = self._grow_low_memory(plan, spec) if self.growth_memory == "low" else self._grow_beside(plan, spec)
        self._engine, self._spec, self.parameters = handover.engine, spec, plan.parameters
        self.stage += 1
        after = self.evaluate(self.engine) if self.evaluate else None
        return growth_record(plan, handover, stage=self.stage, before=before, after=after)

    def _grow_beside(self, plan: GrowthPlan, spec: EngineSpec) -> Handover:
        return hand_over(self.engine, plan, lambda: self._build(plan, spec))

    def _grow_low_memory(self, plan: GrowthPlan, spec: EngineSpec) -> Handover:
        old, old_spec = self.engine, self._spec
        assert old_spec is not None
        before = copy_plan(self.current_parameters(), find_blocks(old.module))
        try:
            return hand_over_parked(
                old,
                plan,
                lambda: self._build(plan, spec),
                before=before,
                rebuild=lambda: self._build(before, old_spec),
            )
        except GrowthRolledBack as rolled_back:
            self._engine = rolled_back.engine
            assert rolled_back.__cause__ is not None
            raise rolled_back.__cause__ from None

    def _build(self, plan: GrowthPlan, spec: EngineSpec) -> DeepSpeedEngine:
        """The engine for `plan`; its weights are drawn only where blocks are fresh, else they are overwritten."""
        fresh = any(entry.source is None for entry in plan.entries)
        with all_ranks_or_none("looking for the memory of the grown engine"):
            self.factory.try_memory(spec, sum(entry.info.numel for entry in plan.entries))
        with isolated_generators(self.seed + plan.to_layers):
            new = self.factory.build(spec, plan.parameters, initialize=fresh)
        old = self.engine.module
        check_alike(old, new.module, find_blocks(old), plan.layers, besides=INITIALISATION)
        return new
