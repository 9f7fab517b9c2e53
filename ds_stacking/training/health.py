"""Steps that would do harm: a loss or gradients that are not finite, and, if wanted, a loss far above the usual.

Such a step is not taken on any rank, and counted; too many in a row end the run, with a file for the post-mortem. What
decides stays on the device: a step whose loss is too high gets gradients that are not finite, which every engine
refuses by itself. The bound is mean + sigma standard deviations of a window of steps, as in OLMo-core's
SkipStepOptimizer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import RunFailed
from ds_stacking.common.files import write_json
from ds_stacking.engine.factory import device
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.similarity import norms
from ds_stacking.growth.state import Kind
from ds_stacking.training.batching import BatchPlan
from ds_stacking.training.state import HeldOutLoss, Position, TrainState, from_all_ranks

WINDOW = 128
"""Steps whose losses make the bound."""
LEAST = 16
"""Steps that must be in the window before it bounds anything."""


class Unhealthy(RunFailed):
    """Too many steps in a row were skipped. Its text says what to do."""


class Health:
    """Judges the steps of a run and counts them in its state. Every rank has one, and all agree."""

    def __init__(self, state: TrainState, *, limit: int, sigma: float) -> None:
        """`limit` steps in a row may be skipped, or any number at 0; a loss is too high from `sigma` on, or never."""
        self.state, self.limit, self.sigma = state, limit, sigma
        self.loss = self._total = torch.zeros((), dtype=torch.float64, device=state.device)

    def factor(self, loss: Tensor) -> Tensor | float:
        """What the step's last micro-batch is multiplied by: 1, or NaN on all ranks where its loss is too high.

        `loss` is this rank's part of the step's loss, a float64 scalar.
        """
        self.loss = loss
        if not self.sigma:
            return 1.0
        self._total = loss.clone()
        dist.all_reduce(self._total)
        if len(self.state.loss_window) < LEAST:
            return 1.0
        known = torch.stack(self.state.loss_window)
        bound = known.mean() + self.sigma * known.std()
        return torch.where(self._total > bound, torch.nan, 1.0)

    def count(self, taken: bool) -> None:
        """Note whether the step was taken."""
        state = self.state
        state.skipped += not taken
        state.skipped_in_a_row = 0 if taken else state.skipped_in_a_row + 1
        if taken and self.sigma:
            state.loss_window = [*state.loss_window[1 - WINDOW :], self._total]

    @property
    def reason(self) -> str:
        """Why the last step was skipped."""
        spike = self.sigma and bool(torch.isfinite(self._total))
        return f"its loss {float(self._total):.2f} is too high" if spike else "its loss or gradients are not finite"

    @property
    def hopeless(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return bool(self.limit) and self.state.skipped_in_a_row > self.limit

    def describe(self) -> str:
        """The last step, which was skipped, in one line."""
        state = self.state
        counted = f"{state.skipped_in_a_row} in a row, {state.skipped} in all"
        return f"step {state.position.step} was skipped: {self.reason}; {counted}"


def end_if_hopeless(
    health: Health, plan: BatchPlan, manager: StageManager, writer: CheckpointWriter, run_dir: Path
) -> None:
    """Raise Unhealthy, with a file for the post-mortem, where step after step was skipped. Collective."""
    if not health.hopeless:
        return
    path = write_post_mortem(health, plan, manager, run_dir)
    writer.wait()
    raise Unhealthy(
        f"{health.state.skipped_in_a_row} optimizer steps in a row were skipped, the last one step "
        f"{health.state.position.step}: {health.reason}. {path} has the losses, batches and norms; lower lr or "
        f"look at the data, then go on with --resume auto."
    )


def write_post_mortem(health: Health, plan: BatchPlan, manager: StageManager, run_dir: Path) -> Path:
    """Write what is known of the last skipped step beside the metrics. Collective."""
    state = health.state
    losses = from_all_ranks(health.loss)
    weights, gradients = _norms(manager, "master"), _norms(manager, "exp_avg")  # which is the mean gradient
    path = run_dir / f"post_mortem-step-{state.position.step}.json"
    if dist.get_rank() == 0:
        first = state.position.samples - plan.sequences
        content: dict[str, Any] = {"step": state.position.step, "reason": health.reason}
        content |= state.state_dict()["health"]
        content["loss_by_rank"] = losses
        content["samples_by_rank"] = [
            [part.tolist() for part in plan.samples(first, rank)] for rank in range(plan.world_size)
        ]
        content["norms_by_block"] = {
            block: {"weights": weights[block], "mean_gradient": gradients[block]} for block in weights
        }
        write_json(path, content, inside=run_dir)
    return path


def refuse_diverged(loss: HeldOutLoss, position: Position, writer: CheckpointWriter) -> None:
    """Raise Unhealthy where a stage has ended with a model that is worth nothing; all ranks know the same loss."""
    if not math.isfinite(loss.all_positions):
        writer.wait()
        raise Unhealthy(
            f"The held-out loss at the end of stage {position.stage + 1} (step {position.step}) is not finite: the "
            f"run has diverged; lower lr, then go back to a checkpoint with --resume DIR, or give --overwrite."
        )


def _norms(manager: StageManager, kind: Kind) -> dict[str, float]:
    """Norms of one kind of the state by block, all its parameters together. Collective."""
    state, parameters = LiveState(manager.engine), manager.parameters
    labels, numels = {name: _block(name) for name in parameters}, {n: info.numel for n, info in parameters.items()}
    return norms(state.slices(), lambda piece: state.read(piece, kind), labels, numels, make_exchange(device()))


def _block(name: str) -> str:
    """The block of a parameter; one of no block counts under the first part of its name."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return f"{first}.{number}" if number.isdigit() else first
