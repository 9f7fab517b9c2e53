"""Evaluations of a run: each step once, told, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_stacking.data.batches import EvalBatches
from ds_stacking.training.growth_metrics import note_later_loss
from ds_stacking.training.held_out import HeldOutLoss, held_out_loss
from ds_stacking.training.metrics import Metrics


@dataclass(kw_only=True)
class Evaluation:
    """The held-out text, and the current engine's loss on it."""

    metrics: Metrics
    held_out: EvalBatches
    poll: Callable[[], None]
    """Called before every micro-batch; what it raises ends the evaluation."""

    def evaluate(self) -> HeldOutLoss:
        """Held-out loss of the current engine; the same step at the same depth is not evaluated twice."""
        state, engine = self.metrics.state, self.metrics.manager.engine
        at = (state.position.step, len(engine.module.blocks))
        if state.evaluated is None or state.evaluated[:2] != at:
            state.evaluated = (*at, self.held_out_loss())
            self.metrics.log_evaluation(state.evaluated[2])
        note_later_loss(self.metrics)
        return state.evaluated[2]

    def held_out_loss(self, *, shuffled: bool = False) -> HeldOutLoss:
        """Held-out loss of the current engine, neither told nor remembered; as a control, with shuffled tokens."""
        size = self.metrics.config.micro_batch_size
        assert size != "auto", "chosen before the first stage"
        with self.metrics.ledger.clock("evaluation"):
            return held_out_loss(
                self.metrics.manager.engine,
                self.held_out,
                micro_batch_size=size,
                device=self.metrics.state.device,
                shuffled=shuffled,
                poll=self.poll,
            )
