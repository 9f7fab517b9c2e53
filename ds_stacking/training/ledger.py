"""The ledger: what a run has spent, in tokens, model FLOPs and seconds, per stage and per phase.

Every second of wall clock since the ledger was made belongs to exactly one phase, so the phases always sum to the
total; processor time is kept alike, for machines whose cores others use too. Totals travel in checkpoints: a resumed
run goes on counting where its checkpoint stood, and time and tokens spent after that checkpoint, then lost, are not
part of the run that produced the model.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PHASES = ("training", "data wait", "evaluation", "growth", "checkpoint", "other")
"""Where wall clock goes; "other" is what runs outside every `clock`."""
STEPS = ("training", "data wait")
"""Phases of training steps: MFU counts them."""
PAUSES = ("evaluation", "growth", "checkpoint")
"""Phases in which no training is attempted: throughput leaves them out."""
COST = ("training", "data wait", "growth")
"""Phases that make the model; the others prepare, measure or save it."""


@dataclass(kw_only=True)
class StageTotals:
    """What one stage has spent and reached; one row of `summary.json`."""

    layers: int
    """Transformer blocks."""
    steps: int = 0
    """Optimizer steps."""
    tokens: int = 0
    """Real tokens (no padding) over all ranks."""
    seconds: float = 0.0
    """Wall clock, all phases together."""
    training_seconds: float = 0.0
    """Wall clock of training steps, waiting for data included."""
    flops: float = 0.0
    """Model FLOPs: the arithmetic of the forward and backward pass, recomputation not counted."""
    train_loss_end: float | None = None
    """Training loss at the stage's end, in nats."""
    eval_loss_end: float | None = None
    """Held-out loss at the stage's end, in nats."""
    eval_loss_masked_end: float | None = None
    """The same on [MASK] positions only."""


@dataclass(kw_only=True)
class Ledger:
    """Counts tokens, model FLOPs and seconds of a run.

    Call `start_stage` before the growth that opens the stage, so that the growth is charged to the depth it makes.
    """

    stages: list[StageTotals] = field(default_factory=list)
    """Stages begun so far, the current one last."""
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Seconds by phase over the whole run."""
    cpu_phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Processor seconds of this process, all its threads, by phase."""
    peak: float | None = None
    """Dense bf16 peak of all GPUs together, FLOP/s; None where it is not known, as on a CPU."""
    now: Callable[[], float] = field(default=time.perf_counter, repr=False)
    """A monotonic clock in seconds."""
    cpu_now: Callable[[], float] = field(default=time.process_time, repr=False)
    """The processor time of this process in seconds."""

    def __post_init__(self) -> None:
        self._mark, self._cpu_mark = self.now(), self.cpu_now()
        self._open: list[str] = []
        self._last = self._progress()

    @property
    def stage(self) -> StageTotals:
        """The current stage."""
        assert self.stages, "start_stage comes first"
        return self.stages[-1]

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Model FLOPs of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Wall clock of the run, that before a resume included."""
        self._charge()
        return sum(self.phases.values())

    def totals(self) -> dict[str, float]:
        """The cumulative fields that every event record carries."""
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "training_seconds": sum(self.phases[phase] for phase in COST),
            "cpu_seconds": sum(self.cpu_phases[phase] for phase in COST),
        }

    def start_stage(self, layers: int) -> None:
        """Begin a stage; time from here on is charged to it."""
        self._charge()
        self.stages.append(StageTotals(layers=layers))

    def add_step(self, *, tokens: int, flops: float = 0.0) -> None:
        """Count one optimizer step with its tokens and model FLOPs over all ranks; FLOPs may be added later."""
        self.stage.steps += 1
        self.stage.tokens += tokens
        self.stage.flops += flops

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Charge the body's wall clock to `phase`; an inner clock stops the outer one meanwhile."""
        assert phase in PHASES, phase
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def rates(self) -> dict[str, float]:
        """Tokens and model FLOPs per second since the last call (or the start), pauses left out; MFU, if known."""
        progress = self._progress()
        tokens, flops, seconds = (new - old for new, old in zip(progress, self._last, strict=True))
        self._last = progress
        seconds = seconds or math.inf
        found = {"tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds}
        return found | ({"mfu": flops / seconds / self.peak} if self.peak else {})

    def stage_rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per stage, as `summary.json` holds them; with its MFU where the peak is known."""
        self._charge()
        rows = [dataclasses.asdict(stage) for stage in self.stages]
        if self.peak:
            for row in rows:
                row["mfu"] = row["flops"] / (row["training_seconds"] or math.inf) / self.peak
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep, as plain JSON values."""
        self._charge()
        stages = [dataclasses.asdict(stage) for stage in self.stages]
        return {"stages": stages, "phases": dict(self.phases), "cpu_phases": dict(self.cpu_phases)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, with every phase and no other; the clock goes on from now."""
        self.stages = [StageTotals(**row) for row in saved["stages"]]
        self.phases = {phase: saved["phases"].get(phase, 0.0) for phase in PHASES}
        self.cpu_phases = {phase: saved["cpu_phases"].get(phase, 0.0) for phase in PHASES}
        self.__post_init__()

    def _charge(self) -> None:
        """Give the time since the last call to the innermost open phase and to the current stage."""
        now, cpu_now = self.now(), self.cpu_now()
        elapsed, self._mark = now - self._mark, now
        phase = self._open[-1] if self._open else "other"
        self.phases[phase] += elapsed
        self.cpu_phases[phase] += cpu_now - self._cpu_mark
        self._cpu_mark = cpu_now
        if self.stages:
            self.stages[-1].seconds += elapsed
            self.stages[-1].training_seconds += elapsed * (phase in STEPS)

    def _progress(self) -> tuple[float, float, float]:
        """Tokens, FLOPs and the seconds in which training was under way."""
        return self.tokens, self.flops, self.seconds - sum(self.phases[name] for name in PAUSES)
