"""Where a run stands: all that training changes, and a checkpoint keeps beside the engine's state and the ledger.

What a run is to do is its RunConfig, which nobody changes; the steps that a trigger settles are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.engine.record import GrowthRecord


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Mean cross entropy in nats per predicted token of the held-out sequences."""

    all_positions: float
    """Over all predicted positions: 80 % [MASK], 10 % random tokens, 10 % left as they were."""
    masked: float
    """Over the positions that hold [MASK] alone: visible tokens, which can be copied, do not count."""


@dataclass(kw_only=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps made."""
    stage: int = 0
    """Current stage, from 0."""
    stage_step: int = 0
    """Optimizer steps made in it."""
    samples: int = 0
    """Training samples consumed."""
    by_length: dict[str, int] = field(default_factory=dict)
    """The same by the length of their sequences: each length has epochs of its own."""

    def advance(self, sequences: int, length: int) -> None:
        """Count one optimizer step on so many sequences of a length."""
        self.step += 1
        self.stage_step += 1
        self.samples += sequences
        self.by_length[str(length)] = self.by_length.get(str(length), 0) + sequences


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands. Every rank has one; only `loss_sum` differs between them."""

    device: torch.device
    stage_steps: list[int]
    """Optimizer steps of every stage: those of the recipe, or what a trigger has made of them."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that resumptions changed."""
    position: Position = field(default_factory=Position)
    steps_in_loss: int = 0
    """Steps whose losses are in `loss_sum`, those since the last line of metrics."""
    skipped: int = 0
    """Steps skipped so far."""
    skipped_in_a_row: int = 0
    """Steps skipped since the last one that was taken."""
    loss_window: list[Tensor] = field(default_factory=list)
    """Losses of the last steps that were taken, as float64 scalars on the device."""
    held_out_losses: list[tuple[float, float]] = field(default_factory=list)
    """FLOPs and loss of the stage's evaluations, in which a plateau is looked for."""
    evaluated: tuple[int, int, HeldOutLoss] | None = None
    """Step and layers of the last evaluation, and what it found."""
    growths: list[GrowthRecord] = field(default_factory=list)
    growing: bool = False
    """Whether the run is amid a growth, or in the trial before it; not kept."""

    def __post_init__(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this rank
        self.work = torch.zeros(3, dtype=torch.int64, device=self.device)  # of the steps not yet in the ledger
        self.charged = self.position.step  # steps that are in the ledger

    @property
    def steps_left(self) -> int:
        """Optimizer steps that the current stage still has."""
        return self.stage_steps[self.position.stage] - self.position.stage_step

    def start_stage(self, stage: int) -> None:
        """Go to the beginning of a stage."""
        self.position.stage, self.position.stage_step = stage, 0
        self.held_out_losses = []

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values, but for work that is not charged yet; `loss_sum` is this rank's own."""
        return {
            "position": asdict(self.position),
            "stage_steps": list(self.stage_steps),
            "loss_sum": float(self.loss_sum),
            "steps_in_loss": self.steps_in_loss,
            "health": {
                "skipped": self.skipped,
                "in_a_row": self.skipped_in_a_row,
                "window": [float(loss) for loss in self.loss_window],
            },
            "held_out_losses": list(self.held_out_losses),
            "evaluated": self.evaluated and [*self.evaluated[:2], asdict(self.evaluated[2])],
            "growths": [asdict(record) for record in self.growths],
            "changes": list(self.changes),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; of a sum over ranks, each loads its part."""
        self.position = Position(**saved["position"])
        self.stage_steps = list(saved["stage_steps"])
        self.loss_sum.fill_(saved["loss_sum"])
        self.steps_in_loss = saved["steps_in_loss"]
        health = saved["health"]
        self.skipped, self.skipped_in_a_row = health["skipped"], health["in_a_row"]
        self.loss_window = [torch.tensor(loss, dtype=torch.float64, device=self.device) for loss in health["window"]]
        self.held_out_losses = [(flops, loss) for flops, loss in saved["held_out_losses"]]
        at = saved["evaluated"]
        self.evaluated = at and (at[0], at[1], HeldOutLoss(**at[2]))
        self.growths = [GrowthRecord(**record) for record in saved["growths"]]
        self.changes = list(saved["changes"])
        self.work.zero_()
        self.charged = self.position.step


def from_all_ranks(value: Tensor) -> list[float]:
    """A scalar of every rank, by rank: NaN on one shows which. Collective."""
    parts = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return [float(part) for part in parts]


def seed_dropout(seed: int, step: int) -> None:
    """Dropout differs between ranks, and between where a run begins and where other ranks took it over."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + dist.get_rank()) % 2**63)
