"""Held-out masked language modelling loss, the same number whatever the ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ds_stacking.data.batches import Batch, EvalBatches
from ds_stacking.training.growth_metrics import note_later_loss
from ds_stacking.training.metrics import Metrics
from ds_stacking.training.state import HeldOutLoss


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


def held_out_loss(
    model: nn.Module,
    batches: EvalBatches,
    *,
    micro_batch_size: int,
    device: torch.device,
    shuffled: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> HeldOutLoss:
    """Evaluate on all ranks together; every rank gets the same result.

    `poll` is called before every micro-batch, equally often on every rank; what it raises ends the evaluation.

    Each rank runs the same number of forward passes, as ZeRO-3, which gathers weights in them, demands; a rank that
    has no sequence left repeats one with weight 0. Dropout is off, so no generator moves.
    """
    training = model.training
    read = batches.shuffled if shuffled else batches.batch
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    model.eval()
    try:
        with torch.no_grad():
            for indices, weight in _rounds(len(batches), micro_batch_size):
                poll()
                totals += weight * _sums(model, read, indices, device)
    finally:
        model.train(training)
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, tokens, masked_loss, masked_tokens = totals.tolist()
    return HeldOutLoss(all_positions=loss / tokens, masked=masked_loss / max(1.0, masked_tokens))


def _rounds(sequences: int, micro_batch_size: int) -> list[tuple[np.ndarray, int]]:
    """This rank's micro-batches with their weights, as many on every rank."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rounds = []
    for start in range(0, sequences, micro_batch_size * world):
        chunk = np.arange(start, min(start + micro_batch_size * world, sequences))
        mine = np.array_split(chunk, world)[rank]
        rounds.append((mine, 1) if len(mine) else (chunk[:1], 0))
    return rounds


def _sums(
    model: nn.Module, read: Callable[[np.ndarray], Batch], indices: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Summed loss and number of tokens over all predicted positions, then over [MASK] positions: [4] float64."""
    batch = read(indices).to(device)
    output = model(**batch.inputs)
    losses = output.token_losses.double()
    is_mask = batch.is_mask.double()
    return torch.stack([losses.sum(), losses.new_tensor(len(losses)), (losses * is_mask).sum(), is_mask.sum()])
