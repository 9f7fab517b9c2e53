"""What a trigger means for the stages of a run: steps computed before the start, a stage ended early, a trial."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ds_stacking.common.errors import UserError
from ds_stacking.common.generators import capture_generators, restore_generators
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.engine.factory import EngineSpec
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
from ds_stacking.training.reporting import charge_flops, make_record

if TYPE_CHECKING:
    from ds_stacking.training.loop import Pretraining


def triggered_stages(config: RunConfig) -> list[StageConfig]:
    """The stages with the steps that the trigger gives them; the model's vocabulary must be known.

    Raises UserError where the trigger does not fit the stages.
    """
    stages, trigger = config.stages, parse_trigger(config.trigger)
    assert isinstance(stages, list)
    check_plateau(config)
    steps = _steps(config, stages, trigger)
    return [replace(stage, steps=count) for stage, count in zip(stages, steps, strict=True)]


def check_plateau(config: RunConfig) -> None:
    """Raise UserError where a stage would end before its evaluations could tell of a plateau, or has its own rate."""
    stages, every, begin = config.stages, config.eval_every, 0
    assert isinstance(stages, list)
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


def end_on_plateau(run: Pretraining, stage: StageConfig, loss: float) -> bool:
    """After an evaluation: where the held-out loss has come to a plateau, end the stage; the next gets its steps."""
    position, trigger = run.position, parse_trigger(run.config.trigger)
    if trigger.kind != "plateau" or position.stage + 1 == len(run.stages):
        return False
    charge_flops(run)
    new = not run.held_out_losses or run.held_out_losses[-1][0] < run.ledger.flops  # else asked again by a resumption
    if new and math.isfinite(loss) and position.step > run.config.warmup_steps:
        run.held_out_losses.append((run.ledger.flops, loss))
    if not has_plateaued(run.held_out_losses, trigger.numbers[0], must_fall=position.stage == 0):
        return False
    run.stages[position.stage + 1].steps += stage.steps - position.stage_step
    stage.steps = position.stage_step
    run.console.line(f"the held-out loss has come to a plateau; the stage ends at step {position.step}")
    return True


def choose_operator(run: Pretraining, stage: StageConfig, spec: EngineSpec) -> str:
    """The operator of the growth into `stage`: that of the recipe, or the best of a trial. Collective."""
    trigger = parse_trigger(run.config.trigger)
    if trigger.kind != "trial":
        return stage.operator or run.config.operator
    losses = {}
    for operator in trigger.operators:
        with run.ledger.clock("growth"):
            losses[operator] = _try(run, operator, int(trigger.numbers[0]), stage, spec)
        record = {"operator": operator, "steps_tried": int(trigger.numbers[0]), "eval_loss": losses[operator]}
        run.tracker.log(make_record(run, "trial") | record)
        run.console.line(
            f"trial of {operator}: held-out loss {losses[operator]:.3f} after {trigger.numbers[0]:.0f} steps"
        )
    return min(losses, key=lambda operator: losses[operator])


def _try(run: Pretraining, operator: str, steps: int, stage: StageConfig, spec: EngineSpec) -> float:
    """Held-out loss after `steps` steps with an operator; then all is as before but the ledger, which is charged."""
    position, health, generators = replace(run.position), run.health.to_dict(), capture_generators()
    counted, evaluate = run.ledger.stage.steps, run.manager.evaluate
    run.manager.evaluate = None
    with run.manager.trial():
        policy = stage.optimizer_state or run.config.optimizer_state
        run.manager.grow(spec, operator=operator, optimizer_state=policy)
        with closing(run.stream(steps)) as batches:
            for batch in batches:
                run.train_step(batch)
        loss = run.held_out_loss().all_positions
        charge_flops(run)
    run.manager.evaluate = evaluate
    run.position, run.settled, run.ledger.stage.steps = position, position.step, counted
    run.loss_sum.zero_()
    run.steps_in_loss = 0
    run.health.load(health)
    run.ledger.rates()  # the next line's rates begin after the trial
    restore_generators(generators)
    return loss
