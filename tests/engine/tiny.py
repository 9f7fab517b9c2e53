"""A tiny model in real engines, and the same training in plain PyTorch, for the tests of growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_stacking.config import ModelConfig, OptimizerConfig
from ds_stacking.engine import stepping
from ds_stacking.engine.factory import EngineFactory, EngineSpec
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.growth.operators import layer_map, originals
from ds_stacking.models.bert import Bert

SEQUENCES, LENGTH, VOCABULARY, RATE, SEED = 12, 16, 101, 5e-3, 7
# eps well above rounding: Adam would blow the rounding of zero gradients up to full updates, after a reset above all
OPTIMIZER = OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, clip=0.5)


def model_config(dropout: float = 0.0, **changes: Any) -> ModelConfig:
    """30 wide: neither 4 ranks nor 16 divide most of its tensors."""
    return ModelConfig(
        hidden_size=30, num_heads=2, vocab_size=VOCABULARY, max_positions=LENGTH, dropout=dropout,
        attention_dropout=dropout, **changes,
    )  # fmt: skip


def factory(zero_stage: int, *, offload: bool = False, bf16: bool = False, dropout: float = 0.0) -> EngineFactory:
    """Engines of the tiny model."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 50  # some parameters persist, others are gathered
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = model_config(dropout)
    return EngineFactory(
        build_model=lambda layers, initialize: Bert(config, layers, initialize=initialize),
        ds_config={"zero_optimization": zero},
        optimizer=OPTIMIZER,
        bf16=bf16,
        layer_by_layer=True,
    )


def spec(layers: int, accumulation: int = 1) -> EngineSpec:
    """The whole batch of SEQUENCES, shared by the ranks."""
    return EngineSpec(
        layers=layers,
        micro_batch_size=SEQUENCES // dist.get_world_size() // accumulation,
        accumulation=accumulation,
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens [SEQUENCES, LENGTH] of a step, with a pattern to learn, and which of them are predicted (bool)."""
    generator = torch.Generator().manual_seed(step)
    start = 11 * torch.randint(0, 4, (SEQUENCES, 1), generator=generator)
    tokens = (start + 7 * torch.arange(LENGTH)) % 60 + 5
    predicted = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.3
    predicted[:, 0] = True
    return tokens, predicted


def part_loss(model: nn.Module, tokens: Tensor, predicted: Tensor, total: int) -> Tensor:
    """Loss of some sequences as a part of the mean over `total` predicted tokens; predicted tokens are hidden."""
    positions = predicted.flatten().nonzero().flatten()
    hidden = tokens.masked_fill(predicted, 4)
    return model(hidden, masked_positions=positions, labels=tokens.flatten()[positions]).loss_sum / total


def train(manager: StageManager, first: int, steps: int) -> list[float]:
    """Train the manager's engine on batches first..first+steps; the global losses."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, first + steps):
        engine = manager.engine
        tokens, predicted = batch(step)
        total = int(predicted.sum())
        for group in engine.optimizer.param_groups:
            group["lr"] = RATE
        loss_sum = torch.zeros(())
        share = SEQUENCES // world_size
        mine = slice(rank * share, (rank + 1) * share)
        micro = engine.train_micro_batch_size_per_gpu()
        parts = list(zip(tokens[mine].split(micro), predicted[mine].split(micro), strict=True))
        stepping.optimizer_step(engine, _parts(engine, parts, total, loss_sum))
        dist.all_reduce(loss_sum)
        losses.append(float(loss_sum))
    return losses


def _parts(engine: Any, parts: list, total: int, loss_sum: Tensor) -> Iterator[Tensor]:
    """What each micro-batch differentiates; the losses are added to `loss_sum`."""
    for tokens, predicted in parts:
        loss = part_loss(engine, tokens, predicted, total)
        loss_sum += loss.detach()
        yield loss * dist.get_world_size()


class PlainTorch:
    """The same training without DeepSpeed: one process, torch AdamW, growth done by hand on full tensors."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(SEED)
        self.model = Bert(model_config(), layers)
        self.optimizer = self._adamw(self.model)

    @staticmethod
    def _adamw(model: nn.Module) -> torch.optim.AdamW:
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)

    def train(self, first: int, steps: int) -> list[float]:
        losses = []
        for step in range(first, first + steps):
            tokens, predicted = batch(step)
            loss = part_loss(self.model, tokens, predicted, int(predicted.sum()))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip)
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def grow(self, layers: int, operator: str, optimizer_state: str) -> None:
        old, old_state = dict(self.model.named_parameters()), self.optimizer.state
        mapping = layer_map(operator, len(self.model.blocks), layers)
        grown = Bert(model_config(), layers)
        optimizer = self._adamw(grown)
        for name, parameter in grown.named_parameters():
            is_copy, source = False, name
            if name.startswith("blocks."):
                _, index, rest = name.split(".", 2)
                source = f"blocks.{mapping[int(index)]}.{rest}"
                is_copy = int(index) not in originals(mapping)
            parameter.data.copy_(old[source].data)
            state = {key: value.clone() for key, value in old_state[old[source]].items()}
            if optimizer_state == "reset" or (optimizer_state == "new_reset" and is_copy):
                state = {key: torch.zeros_like(value) for key, value in state.items()}
            optimizer.state[parameter] = state
        self.model, self.optimizer = grown, optimizer


@contextmanager
def replaced(owner: Any, name: str, value: Callable) -> Iterator[None]:
    """Put `value` in the place of `owner.name`: how the tests inject a fault."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
