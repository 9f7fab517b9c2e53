"""Steps that would do harm: a loss or gradients that are not finite, and, if wanted, a loss far above the usual.

Such a step is not taken on any rank, and counted; too many in a row end the run, with a file for the post-mortem. What
decides stays on the device: a step whose loss is too high gets gradients that are not finite, which every engine
refuses by itself. The bound is mean + sigma standard deviations of a window of steps, as in OLMo-core's
SkipStepOptimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.common.errors import RunFailed
from ds_stacking.common.files import write_json
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import StateReader

if TYPE_CHECKING:
    from ds_stacking.training.loop import Pretraining

WINDOW = 128
"""Steps whose losses make the bound."""
LEAST = 16
"""Steps that must be in the window before it bounds anything."""


class Unhealthy(RunFailed):
    """Too many steps in a row were skipped. Its text says what to do."""


@dataclass(kw_only=True)
class Health:
    """Judges and counts the steps of a run. Every rank has one, and all agree."""

    limit: int
    """Steps in a row that may be skipped; one more ends the run. 0: any number."""
    sigma: float
    """Standard deviations above the window's mean at which a loss is too high; 0: none is."""
    device: torch.device
    skipped: int = 0
    """Steps skipped so far."""
    in_a_row: int = 0
    """Steps skipped since the last one that was taken."""
    window: list[Tensor] = field(default_factory=list)
    """Losses of the last steps that were taken, as float64 scalars on the device."""

    def __post_init__(self) -> None:
        self.loss = self._total = torch.zeros((), dtype=torch.float64, device=self.device)

    def factor(self, loss: Tensor) -> Tensor | float:
        """What the step's last micro-batch is multiplied by: 1, or NaN on all ranks where its loss is too high.

        `loss` is this rank's part of the step's loss, a float64 scalar.
        """
        self.loss = loss
        if not self.sigma:
            return 1.0
        self._total = loss.clone()
        dist.all_reduce(self._total)
        if len(self.window) < LEAST:
            return 1.0
        known = torch.stack(self.window)
        bound = known.mean() + self.sigma * known.std()
        return torch.where(self._total > bound, torch.nan, 1.0)

    def count(self, taken: bool) -> None:
        """Note whether the step was taken."""
        self.skipped += not taken
        self.in_a_row = 0 if taken else self.in_a_row + 1
        if taken and self.sigma:
            self.window = [*self.window[1 - WINDOW :], self._total]

    @property
    def reason(self) -> str:
        """Why the last step was skipped."""
        spike = self.sigma and bool(torch.isfinite(self._total))
        return f"its loss {float(self._total):.2f} is too high" if spike else "its loss or gradients are not finite"

    @property
    def hopeless(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return bool(self.limit) and self.in_a_row > self.limit

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "window": [float(loss) for loss in self.window]}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what `to_dict` gave."""
        self.skipped, self.in_a_row = saved["skipped"], saved["in_a_row"]
        self.window = [torch.tensor(loss, dtype=torch.float64, device=self.device) for loss in saved["window"]]


def write_post_mortem(run: Pretraining) -> Path:
    """Write what is known of the last skipped step beside the metrics; all ranks call it together."""
    step = run.position.step
    losses = losses_by_rank(run.health.loss)
    norms = norms_by_block(LiveState(run.engine), run.manager.parameters, run.device)
    path = run.run_dir / f"post_mortem-step-{step}.json"
    if run.rank == 0:
        plan = run.plans[run.position.stage]
        first = run.position.samples - plan.sequences
        samples = [[part.tolist() for part in plan.samples(first, rank)] for rank in range(run.world_size)]
        content = {"step": step, "reason": run.health.reason, **run.health.to_dict()}
        content |= {"loss_by_rank": losses, "samples_by_rank": samples, "norms_by_block": norms}
        write_json(path, content, inside=run.run_dir)
    return path


def losses_by_rank(loss: Tensor) -> list[float]:
    """The last step's part of the loss from every rank: NaN on one shows which. All ranks call it together."""
    parts = [torch.zeros_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, loss)
    return [float(part) for part in parts]


def norms_by_block(
    state: StateReader, parameters: Mapping[str, ParameterInfo], device: torch.device
) -> dict[str, dict[str, float]]:
    """Norms of the weights and of Adam's first moment, the mean gradient, of every block over all ranks.

    A parameter of no block counts under the first part of its name. All ranks call it together.
    """
    blocks = list(dict.fromkeys(_block(name) for name in parameters))
    sums = torch.zeros(len(blocks), 3, dtype=torch.float64, device=device)  # [blocks, (weights, moments, elements)]
    for piece in state.slices():
        squares = [state.read(piece, kind).double().square().sum() for kind in ("master", "exp_avg")]
        sums[blocks.index(_block(piece.name))] += torch.stack([*squares, squares[0].new_tensor(piece.numel)]).to(
            device
        )
    dist.all_reduce(sums)
    norms = {}
    for block, (weights, moments, elements) in zip(blocks, sums.tolist(), strict=True):
        copies = elements / sum(info.numel for name, info in parameters.items() if _block(name) == block)
        norms[block] = {"weights": math.sqrt(weights / copies), "mean_gradient": math.sqrt(moments / copies)}
    return norms


def _block(name: str) -> str:
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return f"{first}.{number}" if number.isdigit() else first
