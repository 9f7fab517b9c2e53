"""What a trigger means for the stages of a run: steps computed before the start, a stage ended early, a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ds_stacking.common.errors import UserError
from ds_stacking.common.generators import capture_generators, restore_generators
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.growth.triggers import (
    EVALUATIONS,
    Trigger,
    gstack_tokens,
    has_plateaued,
    parse_trigger,
    steps_by_amount,
    steps_by_prop,
)
from ds_stacking.models.bert import Bert
from ds_stacking.models.flops import training_flops_per_token
from ds_stacking.training.metrics import Metrics


def triggered_stages(config: RunConfig) -> list[StageConfig]:
    """The stages with the steps that the trigger gives them; the model's vocabulary must be known.

    Raises UserError where the trigger does not fit the stages.
    """
    stages, trigger = config.stages, parse_trigger(config.trigger)
    check_plateau(config)
    steps = _steps(config, stages, trigger)
    return [replace(stage, steps=count) for stage, count in zip(stages, steps, strict=True)]


def check_plateau(config: RunConfig) -> None:
    """Raise UserError where a stage would end before its evaluations could tell of a plateau, or has its own rate."""
    stages, every, begin = config.stages, config.eval_every, 0
    if parse_trigger(config.trigger).kind != "plateau":
        return
    if any(stage.lr is not None for stage in stages):
        raise UserError("trigger plateau moves the ends of stages, so give the run's schedule and no lr in stages.")
    for stage in stages[:-1]:
        after = max(begin, config.warmup_steps)
        begin += stage.steps
        last = begin - 1  # the stage's last step is its end anyway
        found = last // every - after // every if every else 0
        if found >= EVALUATIONS:
            continue
        most = max(0, last - after) // EVALUATIONS
        mend = f"--eval_every {most} or less" if most else "the stage more steps"
        raise UserError(
            f"trigger plateau needs {EVALUATIONS} evaluations in a stage after warm-up, but stage "
            f"{stage.layers}:{stage.steps} has {max(0, found)} with --eval_every {every}; give {mend}."
        )


def _steps(config: RunConfig, stages: list[StageConfig], trigger: Trigger) -> list[int]:
    given = [stage.steps for stage in stages]
    tokens = [stage.tokens_per_step or config.tokens_per_step for stage in stages]
    if trigger.kind == "tokens":
        return steps_by_amount(trigger.numbers, tokens, given[-1])
    if trigger.kind == "flops":
        rate = config.corpus.masking_rate
        per_token = [
            training_flops_per_token(config.model, stage.layers, length=config.length_of(stage), masking_rate=rate)
            for stage in stages
        ]
        each = [count * flops for count, flops in zip(tokens, per_token, strict=True)]
        return steps_by_amount(trigger.numbers, each, given[-1])
    if trigger.kind == "prop":
        return steps_by_prop(sum(given), len(stages), trigger.numbers[0])
    if trigger.kind == "gstack":
        return _gstack(config, stages, tokens)
    return given


def _gstack(config: RunConfig, stages: list[StageConfig], tokens: list[int]) -> list[int]:
    if len(stages) != 2:
        raise UserError(f"trigger gstack times one growth, but there are {len(stages)} stages; give two.")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Bert(config.model, stages[-1].layers).parameters())
    total = sum(stage.steps * each for stage, each in zip(stages, tokens, strict=True))
    first = round(gstack_tokens(parameters, total) / tokens[0])
    steps = stages[0].steps + stages[1].steps
    if not 0 < first < steps:
        raise UserError(
            f"trigger gstack would grow after {first:,} of {steps:,} steps: its formula, fitted to large models, does "
            f"not reach down to {parameters:,} parameters and {total:,} tokens; choose another trigger."
        )
    return [first, steps - first]


def end_on_plateau(metrics: Metrics, loss: float) -> bool:
    """After an evaluation: where the held-out loss has come to a plateau, end the stage; the next gets its steps."""
    state, config, ledger = metrics.state, metrics.config, metrics.ledger
    position, trigger = state.position, parse_trigger(config.trigger)
    if trigger.kind != "plateau" or position.stage + 1 == len(config.stages):
        return False
    metrics.charge_flops()
    losses = state.held_out_losses
    new = not losses or losses[-1][0] < ledger.flops  # else asked again by a resumption
    if new and math.isfinite(loss) and position.step > config.warmup_steps:
        losses.append((ledger.flops, loss))
    if not has_plateaued(losses, trigger.numbers[0], must_fall=position.stage == 0):
        return False
    state.stage_steps[position.stage + 1] += state.steps_left
    state.stage_steps[position.stage] = position.stage_step
    metrics.log(f"the held-out loss has come to a plateau; the stage ends at step {position.step}")
    return True


def choose_operator(metrics: Metrics, stage: StageConfig, attempt: Callable[[str, int], float]) -> str:
    """The operator of the growth into `stage`: that of the recipe, or the best of a trial. Collective.

    `attempt` returns the held-out loss after so many steps with an operator, and leaves all as it was.
    """
    trigger = parse_trigger(metrics.config.trigger)
    if trigger.kind != "trial":
        return stage.operator or metrics.config.operator
    losses, steps = {}, int(trigger.numbers[0])
    for operator in trigger.operators:
        with metrics.ledger.clock("growth"):
            losses[operator] = attempt(operator, steps)
        metrics.record("trial", {"operator": operator, "steps_tried": steps, "eval_loss": losses[operator]})
        metrics.log(f"trial of {operator}: held-out loss {losses[operator]:.3f} after {steps} steps")
    return min(losses, key=lambda operator: losses[operator])


@contextmanager
def trial(metrics: Metrics) -> Iterator[None]:
    """Whatever is trained inside, afterwards all is as before but the ledger, which is charged."""
    state, manager, ledger = metrics.state, metrics.manager, metrics.ledger
    before, generators = state.state_dict(), capture_generators()
    counted, evaluate = ledger.stage.steps, manager.evaluate
    manager.evaluate = None
    with manager.trial():
        yield
        metrics.charge_flops()
    manager.evaluate = evaluate
    state.load_state_dict(before)
    ledger.stage.steps = counted
    ledger.rates()  # the next line's rates begin after the trial
    restore_generators(generators)
