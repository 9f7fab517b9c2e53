"""The stage manager: drains an engine, grows its weights and optimizer state into a new one, and goes on.

The default process group is never torn down, the data position lies outside the engine, and every random number
generator is as it was before the growth.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.engine.factory import EngineFactory, EngineSpec, device
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import MoveReport, execute
from ds_stacking.growth.operators import layer_map
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, copy_plan, make_plan
from ds_stacking.growth.state import StateReader

Evaluate = Callable[[DeepSpeedEngine], float]


@dataclass(frozen=True, kw_only=True)
class GrowthRecord:
    """What a growth did."""

    from_layers: int
    to_layers: int
    operator: str
    optimizer_state: str
    stage: int
    """The stage that begins."""
    seconds: float
    """Wall-clock of the growth without the evaluations."""
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    """build (model and engine), then the executor's phases, then release."""
    bytes_moved: int
    """fp32 bytes written into the new engine, over this rank."""
    tensors_verified: int
    """Target tensors compared with their source."""
    eval_loss_before: float | None = None
    """Held-out loss of the old engine."""
    eval_loss_after: float | None = None
    """Held-out loss of the new engine."""


class StageManager:
    """Owns the engine of the current stage and replaces it at a growth."""

    def __init__(self, factory: EngineFactory, *, seed: int = 0, evaluate: Evaluate | None = None) -> None:
        self.factory = factory
        self.seed = seed
        self.evaluate = evaluate
        self.stage = 0
        self._engine: DeepSpeedEngine | None = None
        self.parameters: dict[str, ParameterInfo] = {}

    @property
    def engine(self) -> DeepSpeedEngine:
        """The engine of the current stage."""
        assert self._engine is not None, "start() comes first"
        return self._engine

    def start(self, spec: EngineSpec) -> DeepSpeedEngine:
        """Build the first stage's engine, its weights drawn from the seed."""
        with isolated_generators(self.seed):
            self._engine = self.factory.build(spec)
        self.parameters = self.factory.describe(self._engine.module)
        return self._engine

    def restore(
        self, spec: EngineSpec, parameters: Mapping[str, ParameterInfo], source: StateReader, *, stage: int
    ) -> DeepSpeedEngine:
        """Build the engine of `stage` and fill it from a store, such as a checkpoint; every tensor is verified."""
        with isolated_generators(self.seed):
            self._engine = self.factory.build(spec, parameters, initialize=False)
        plan = copy_plan(parameters, find_blocks(self._engine.module))
        execute(plan, source, LiveState(self._engine), make_exchange(device()))
        self.parameters, self.stage = dict(parameters), stage
        return self._engine

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
        )

    def grow(self, spec: EngineSpec, *, operator: str = "stack", optimizer_state: str = "stack") -> GrowthRecord:
        """Grow into the engine that `spec` describes. All ranks call it together, between optimizer steps.

        Raises UserError for a depth that the operator cannot reach, before anything is touched, and RuntimeError
        where a tensor of the new engine differs from its source; the old engine is then still the current one.
        """
        assert self.engine.micro_steps % self.engine.gradient_accumulation_steps() == 0, "in the middle of a step"
        plan = self.plan(spec.layers, operator, optimizer_state)
        before = self.evaluate(self.engine) if self.evaluate else None
        start = time.perf_counter()
        fresh = any(entry.source is None for entry in plan.entries)
        with isolated_generators(self.seed + plan.to_layers):
            new = self.factory.build(spec, plan.parameters, initialize=fresh)
        built = time.perf_counter()
        report = execute(plan, LiveState(self.engine), LiveState(new), make_exchange(device()))
        _carry_counters(self.engine, new)
        moved = time.perf_counter()
        release(self.engine)
        self._engine, self.parameters, self.stage = new, plan.parameters, self.stage + 1
        collect()
        end = time.perf_counter()
        after = self.evaluate(new) if self.evaluate else None
        phases = {"build": built - start, **report.seconds, "release": end - moved}
        return self._record(plan, report, end - start, phases, before, after)

    def _record(
        self,
        plan: GrowthPlan,
        report: MoveReport,
        seconds: float,
        phases: dict[str, float],
        before: float | None,
        after: float | None,
    ) -> GrowthRecord:
        return GrowthRecord(
            from_layers=plan.from_layers,
            to_layers=plan.to_layers,
            operator=plan.operator,
            optimizer_state=plan.optimizer_state,
            stage=self.stage,
            seconds=seconds,
            seconds_by_phase=phases,
            bytes_moved=report.bytes_copied + report.bytes_received,
            tensors_verified=report.tensors_verified,
            eval_loss_before=before,
            eval_loss_after=after,
        )


def release(engine: DeepSpeedEngine) -> None:
    """Free an engine: DeepSpeed's own destroy leaves its flat buffers alive through reference cycles."""
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter.grad = None
    engine.optimizer = None


def collect() -> None:
    """Collect what the released engine's reference cycles held, on the device too."""
    gc.collect()
    get_accelerator().empty_cache()


def _carry_counters(old: DeepSpeedEngine, new: DeepSpeedEngine) -> None:
    """DeepSpeed's own counts go on; micro_steps begins anew, since the number of micro-batches may differ."""
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(new, name, getattr(old, name))


@contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Seed torch inside, and leave every generator (Python, NumPy, torch, devices) as it was outside."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device().index] if device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
