"""Epsilon before and behind Adam's bias correction: engines against formulas written out for single tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_stacking.engine import epsilon, stepping, zero_state
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.models.bert import Bert
from tests.engine.tiny import OPTIMIZER, RATE, SEED, batch, factory, model_config, part_loss, replaced, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

EPS = 1e-3
"""Of the size of the gradients, so that it matters where it is added."""
STEPS = 3
ENGINES = ((0, False, 1), (1, False, 3), (2, True, 1), (3, False, 1))
"""ZeRO stage, offload of the optimizer, micro-batches of a step on one of two ranks."""
FAULTS = (
    (stepping, "set_epsilon", "reset"),
    (stepping, "count_update", "reset"),
    (zero_state, "set_count", "new_reset"),
)
"""Left out one by one, they show what the test would see if the setting or the count were ignored; with the policy."""


def engine_curve(zero_stage: int, offload: bool, accumulation: int, corrected: bool, policy: str) -> list[float]:
    """Losses before and after a growth; on the way a step is skipped, and the engine replaced by a restored one."""
    optimizer = replace(OPTIMIZER, eps=EPS, eps_correction=corrected)
    manager = StageManager(replace(factory(zero_stage, offload=offload), optimizer=optimizer), seed=SEED)
    manager.start(spec(2, accumulation))
    losses = train(manager, 0, STEPS)
    manager.grow(spec(4, accumulation), optimizer_state=policy)
    losses += train(manager, STEPS, STEPS)
    skip(manager)
    losses += train(manager, 2 * STEPS, STEPS)
    with manager.trial():
        train(manager, 0, 1)
    return losses + train(manager, 3 * STEPS, STEPS)


def skip(manager: StageManager) -> None:
    """A step with gradients that are not finite."""
    engine = manager.engine
    tokens, predicted = (part[: engine.train_micro_batch_size_per_gpu()] for part in batch(0))
    parts = engine.gradient_accumulation_steps()
    losses = (part_loss(engine, tokens, predicted, 1) * math.nan for _ in range(parts))
    assert not stepping.optimizer_step(engine, losses)


def engines() -> tuple[list[tuple[bool, str, list[float]]], list[list[float]]]:
    """The curves of engines by form and policy, and those with a fault (by the formula of fairseq)."""
    cases = [(*engine, False, "reset") for engine in ENGINES]
    cases += [(2, False, 1, True, "reset"), (1, False, 1, False, "new_reset")]
    found = [(corrected, policy, engine_curve(*engine, corrected, policy)) for *engine, corrected, policy in cases]
    faults = []
    for module, name, policy in FAULTS:
        with replaced(module, name, lambda *_: None):
            faults.append(engine_curve(1, False, 1, False, policy))
    return found, faults


class Formulas:
    """The same training on single tensors, each with moments and a step count of its own."""

    def __init__(self, corrected: bool) -> None:
        torch.manual_seed(SEED)
        self.corrected = corrected
        self.model = Bert(model_config(), 2)
        self.state = {name: self.fresh(p) for name, p in self.model.named_parameters()}

    @staticmethod
    def fresh(parameter: Tensor) -> list[Any]:
        return [0, torch.zeros_like(parameter), torch.zeros_like(parameter)]

    def grow(self, policy: str) -> None:
        """2 blocks become 4, ABAB."""
        grown = Bert(model_config(), 4)
        old, state = dict(self.model.named_parameters()), {}
        for name, parameter in grown.named_parameters():
            source = name.replace("blocks.2.", "blocks.0.").replace("blocks.3.", "blocks.1.")
            parameter.data.copy_(old[source].data)
            afresh = policy == "reset" or (policy == "new_reset" and name != source)
            step, first, second = self.fresh(parameter) if afresh else self.state[source]
            state[name] = [step, first.clone(), second.clone()]
        self.model, self.state = grown, state

    def train(self, first: int, steps: int) -> list[float]:
        losses = []
        for index in range(first, first + steps):
            tokens, predicted = batch(index)
            loss = part_loss(self.model, tokens, predicted, int(predicted.sum()))
            self.model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip)
            for name, parameter in self.model.named_parameters():
                self.update(self.state[name], parameter.data, parameter.grad)
            losses.append(loss.item())
        return losses

    def update(self, state: list[Any], weights: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        (one, two), decay = OPTIMIZER.betas, OPTIMIZER.weight_decay if weights.ndim > 1 else 0.0
        state[0] += 1
        state[1] = one * state[1] + (1 - one) * gradient
        state[2] = two * state[2] + (1 - two) * gradient**2
        t, m, v = state
        weights *= 1 - RATE * decay
        if self.corrected:
            weights -= RATE * (m / (1 - one**t)) / ((v / (1 - two**t)).sqrt() + EPS)
        else:
            weights -= RATE * math.sqrt(1 - two**t) / (1 - one**t) * m / (v.sqrt() + EPS)

    def curve(self, policy: str) -> list[float]:
        losses = self.train(0, STEPS)
        self.grow(policy)
        return losses + self.train(STEPS, 3 * STEPS)


def test_both_forms_over_a_growth() -> None:
    found, faults = run_ranks(2, engines)[0]
    for corrected, policy, losses in found:
        assert losses == pytest.approx(Formulas(corrected).curve(policy), rel=2e-5)
    for (*_, policy), losses in zip(FAULTS, faults, strict=True):
        assert losses != pytest.approx(Formulas(False).curve(policy), rel=1e-3)


def test_groups_without_the_setting_are_left_alone() -> None:
    group = {"eps": EPS, "betas": (0.9, 0.999)}
    for change in (epsilon.set_epsilon, epsilon.count_update):
        change([group])
    epsilon.set_count(group, 5)
    assert group == {"eps": EPS, "betas": (0.9, 0.999)}
