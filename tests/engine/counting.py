"""Counts what an optimizer step asks of the device outside of forward and backward passes.

A tensor operation that is no view is a launch on a GPU, or several; what reads a value back to the host is a wait.
`python -m tests.engine.counting` prints the counts of this machine's DeepSpeed with our step and with its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_stacking.config import ModelConfig
from ds_stacking.engine import factory as factories
from ds_stacking.engine import stepping
from ds_stacking.engine.factory import EngineFactory, EngineSpec
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.models.bert import Bert
from tests.engine.tiny import OPTIMIZER, part_loss, replaced

LAYERS, LENGTH, VOCABULARY = 12, 8, 32
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2")
"""Operations whose result the host must know."""


class Operations(TorchDispatchMode):
    """Counts by name what runs while it is not paused."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        launches = not function.is_view and function.namespace != "profiler" and name not in ("detach", "empty")
        if launches and not self.paused:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @property
    def waits(self) -> int:
        """Values that the host asked for."""
        return sum(self.counts[name] for name in WAITS)

    @property
    def launches(self) -> int:
        """All others."""
        return self.counts.total() - self.waits


def small_bert(layers: int, initialize: bool) -> Bert:
    """154 tensors at 12 layers and the tensors of BERT-base's names, 8 wide."""
    config = ModelConfig(hidden_size=8, num_heads=2, vocab_size=VOCABULARY, max_positions=LENGTH, dropout=0.0)
    return Bert(replace(config, attention_dropout=0.0), layers, initialize=initialize)


def engines(stage: int, *, bf16: bool, clip: float = 0.5, **zero: Any) -> EngineFactory:
    """Engines of the model above."""
    zero = {"stage": stage, **zero}
    optimizer = replace(OPTIMIZER, clip=clip)
    return EngineFactory(build_model=small_bert, ds_config={"zero_optimization": zero}, optimizer=optimizer, bf16=bf16)


def losses(engine: Any, seen: Operations, accumulation: int) -> Iterator[Tensor]:
    """Of one step; forward passes are not counted."""
    for _ in range(accumulation):
        with seen.pause():
            tokens = torch.arange(LENGTH)[None] % (VOCABULARY - 5) + 5
            loss = part_loss(engine, tokens, torch.arange(LENGTH)[None] % 4 == 0, 2 * accumulation)
        yield loss


def count(stage: int, *, bf16: bool, groups: int, accumulation: int, **zero: Any) -> Operations:
    """What one step asks for, after others; `groups` is 2, or 6 after two growths."""
    manager = StageManager(engines(stage, bf16=bf16, **zero), seed=7)
    depths = {2: (LAYERS,), 6: (LAYERS // 4, LAYERS // 2, LAYERS)}[groups]

    def spec(layers: int) -> EngineSpec:
        return EngineSpec(layers=layers, micro_batch_size=1, accumulation=accumulation)

    seen = Operations()
    manager.start(spec(depths[0]))
    for layers in depths[1:]:
        stepping.optimizer_step(manager.engine, losses(manager.engine, seen, accumulation))
        manager.grow(spec(layers))
    engine = manager.engine
    assert len(engine.optimizer.param_groups) == groups
    for _ in range(2):
        assert stepping.optimizer_step(engine, losses(engine, seen, accumulation))
    backward = engine.backward

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        with seen.pause():
            return backward(*args, **kwargs)

    engine.backward = uncounted
    with seen:
        assert stepping.optimizer_step(engine, losses(engine, seen, accumulation))
    del engine.backward
    release(engine)
    collect()
    return seen


def main() -> None:
    """Print a table; the plain optimizer of ZeRO 0 in fp32 is ours in any case."""
    factories.init_distributed(alone=True)
    print("| ZeRO | precision | groups | micro-batches | launches, DeepSpeed's | ours | waits, DeepSpeed's | ours |")
    print("|---|---|---|---|---|---|---|---|")
    for stage, bf16 in ((stage, bf16) for stage in range(4) for bf16 in (True, False)):
        zero: dict[str, Any] = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        for groups, accumulation in ((2, 1), (2, 4), (6, 4)):
            case: dict[str, Any] = {"bf16": bf16, "groups": groups, "accumulation": accumulation, **zero}
            ours = theirs = count(stage, **case)
            if stage or bf16:
                with replaced(factories, "adopt", lambda engine: None):
                    theirs = count(stage, **case)
            name = f"| {stage} | {'bf16' if bf16 else 'fp32'} | {groups} | {accumulation} |"
            print(f"{name} {theirs.launches} | {ours.launches} | {theirs.waits} | {ours.waits} |", flush=True)


if __name__ == "__main__":
    main()
