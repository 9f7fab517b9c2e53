"""What a run tells of itself while it trains: records for the tracker, lines for the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from ds_stacking.config import RunConfig
from ds_stacking.engine.record import GrowthRecord
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.models.compiling import compilations
from ds_stacking.models.flops import training_flops
from ds_stacking.training.batching import BatchPlan
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.progress import Console, growth_line
from ds_stacking.training.state import HeldOutLoss, TrainState
from ds_stacking.training.tracking import FanOut, Tracker


@dataclass(kw_only=True)
class Metrics:
    """Where a run stands and what it has spent, told to the tracker and the console."""

    config: RunConfig
    plans: Sequence[BatchPlan]
    state: TrainState
    manager: StageManager
    console: Console
    ledger: Ledger
    tracker: Tracker = field(default_factory=FanOut)

    def log(self, text: str) -> None:
        """Print a line, on rank 0."""
        self.console.log(text)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Track a record."""
        self.tracker.log(self.make_record(kind) | dict(values))

    def make_record(self, kind: str) -> dict[str, Any]:
        """The fields that every record has: where the run stands, and the ledger's totals."""
        self.charge_flops()
        position = self.state.position
        return {
            "kind": kind,
            "step": position.step,
            "stage": position.stage,
            "layers": len(self.manager.engine.module.blocks),
            **self.ledger.totals(),
        }

    def charge_flops(self) -> None:
        """Charge the FLOPs of the steps since the last call; what they masked and attended to the device knows."""
        state, plan = self.state, self.plans[self.state.position.stage]
        steps, state.charged = state.position.step - state.charged, state.position.step
        if steps:
            masked, pairs, masked_pairs = state.work.tolist()
            self.ledger.stage.flops += training_flops(
                self.config.model,
                self.ledger.stage.layers,
                sequences=steps * plan.sequences,
                length=plan.sequence_length,
                masked=masked,
                pairs=pairs,
                masked_pairs=masked_pairs,
            )
            state.work.zero_()

    def log_training(self, rate: float) -> None:
        """Read the losses of the steps since the last line, over all ranks, and log them. Collective.

        `rate` is the learning rate of the last step.
        """
        state, ledger = self.state, self.ledger
        total = state.loss_sum.clone()
        dist.all_reduce(total)
        loss = float(total) / state.steps_in_loss if state.steps_in_loss else math.nan
        state.loss_sum.zero_()
        state.steps_in_loss = 0
        norm = self.manager.engine.get_global_grad_norm()
        record = self.make_record("train")
        record |= {"loss": loss, "lr": rate, "grad_norm": None if norm is None else float(norm), **ledger.rates()}
        record |= {"skipped_steps": state.skipped, "seconds_by_phase": dict(ledger.phases)}
        if self.config.compile:
            record |= {f"compiled_{name}": count for name, count in asdict(compilations()).items()}
        ledger.stage.train_loss_end = loss
        self.tracker.log(record)
        self.console.update(state.position.stage_step, record)

    def log_evaluation(self, loss: HeldOutLoss) -> None:
        """Log a held-out loss of the current engine."""
        self.record("eval", {"eval_loss": loss.all_positions, "eval_loss_masked": loss.masked})

    def log_growth(self, growth: GrowthRecord) -> None:
        """Log a growth, and say it."""
        record = self.make_record("growth")
        later = ("eval_loss_later", "observations")
        record |= {name: value for name, value in asdict(growth).items() if name not in record and name not in later}
        record["seconds_growth"] = growth.seconds
        self.tracker.log(record)
        self.log(growth_line(record))
