"""The training loop: stages, steps, evaluations, growths.

Losses, norms and counts stay on the device and are read when a line is logged, and whether somebody asked to stop is
known a step later, so no step waits for the host or for another rank's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import OtherRankFailed, RunAgain, RunFailed
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.data.batches import Batch, EvalBatches, MaskedBatches
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.engine.factory import Engine, EngineSpec
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.stepping import optimizer_step
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.training.batching import BatchPlan, StepBatches, engine_spec, stream_steps
from ds_stacking.training.checkpointing import log_failed_saves, save
from ds_stacking.training.export import try_export
from ds_stacking.training.growth_metrics import observe_growth, snapshot_moments
from ds_stacking.training.health import Health, end_if_hopeless, refuse_diverged
from ds_stacking.training.held_out import Evaluation
from ds_stacking.training.metrics import Metrics
from ds_stacking.training.preemption import SharedStop
from ds_stacking.training.schedule import Schedule
from ds_stacking.training.state import TrainState, seed_dropout
from ds_stacking.training.triggering import choose_operator, end_on_plateau, trial
from ds_stacking.training.watchdog import Watchdog

SECONDS_AFTER_A_FAILURE = 10.0
"""How long a failed run waits for the save under way."""


@dataclass(kw_only=True)
class Pretraining:
    """One run: what it works with. Where it stands is its `state`."""

    config: RunConfig
    state: TrainState
    metrics: Metrics
    """What it tells, and its ledger."""
    data: PreparedData
    batches: dict[int, MaskedBatches]
    """Training batches by sequence length."""
    held_out: EvalBatches
    training_text: EvalBatches
    """Sequences of the training split, masked as the held-out ones: what the controls are fitted on."""
    plans: list[BatchPlan]
    """Batch arithmetic by stage."""
    manager: StageManager
    writer: CheckpointWriter
    stop: SharedStop
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self.device, self.run_dir = self.state.device, Path(self.config.run_dir)
        self.schedule, self.ledger = Schedule(self.config), self.metrics.ledger
        self.health = Health(self.state, limit=self.config.max_skipped_steps, sigma=self.config.skip_above_sigma)
        self.evaluation = Evaluation(metrics=self.metrics, held_out=self.held_out, poll=self.poll)
        self.manager.evaluate = lambda _: self.evaluation.evaluate().all_positions

    @property
    def engine(self) -> Engine:
        """The current stage's engine."""
        return self.manager.engine

    @property
    def plan(self) -> BatchPlan:
        """The current stage's batch arithmetic."""
        return self.plans[self.state.position.stage]

    def close(self, exit_code: int = 0) -> None:
        """End what runs in the background."""
        self.watchdog.close()
        self.metrics.console.close()
        self.writer.close(SECONDS_AFTER_A_FAILURE if exit_code else None)
        self.metrics.tracker.close(exit_code)

    def train(self, *, stage_finished: bool = False) -> None:
        """Run all stages, from where the run stands, to the end.

        The engine of the stage that the run stands in is there; `stage_finished` says that this stage is over.
        """
        first = self.state.position.stage
        for index, stage in list(enumerate(self.config.stages))[first + stage_finished :]:
            if index > first:
                self.open_stage(index, stage)
            self.train_stage(stage)
            self.close_stage(stage)

    def open_stage(self, index: int, stage: StageConfig) -> None:
        """Build the first engine, or grow into the stage's."""
        self.ledger.start_stage(stage.layers)
        self.state.start_stage(index)
        spec = engine_spec(stage, self.plan)
        if index:
            self.grow(stage, spec)
            return
        self.manager.start(spec)
        seed_dropout(self.config.seed, self.state.position.step)

    def grow(self, stage: StageConfig, spec: EngineSpec) -> None:
        """One growth, told to the console and the tracker."""
        policy = stage.optimizer_state or self.config.optimizer_state

        def attempt(operator: str, steps: int) -> float:
            with trial(self.metrics):
                self.manager.grow(spec, operator=operator, optimizer_state=policy)
                with closing(self.stream(steps)) as batches:
                    for step in batches:
                        self.train_step(step)
                return self.evaluation.held_out_loss().all_positions

        self.state.growing = True
        operator = choose_operator(self.metrics, stage, attempt)
        with self.ledger.clock("growth"):
            record = self.manager.grow(spec, operator=operator, optimizer_state=policy)
        self.state.growing = False
        self.state.growths.append(record)
        self.metrics.log_growth(record)

    def stream(self, steps: int) -> Generator[StepBatches]:
        """This rank's micro-batches of the next `steps` steps."""
        source = self.batches[self.plan.sequence_length]
        return stream_steps(source, self.plan, self.state.position, steps, self.device)

    def train_stage(self, stage: StageConfig) -> None:
        """The optimizer steps of the current stage that are left."""
        position, steps_left = self.state.position, self.state.steps_left
        self.metrics.console.start_stage(
            stage=position.stage,
            stages=len(self.config.stages),
            layers=stage.layers,
            steps=position.stage_step + steps_left,
            done=position.stage_step,
        )
        if position.stage_step:
            self.evaluate_if_due()  # the run may have been stopped in this very evaluation
        with closing(self.stream(steps_left)) as steps:
            while self.state.steps_left and (batches := self.next_batches(steps)):
                with self.ledger.clock("training"):
                    self.train_step(batches)
                self.report()

    def next_batches(self, steps: Iterator[StepBatches]) -> StepBatches | None:
        """The batches of the next step, if there is one."""
        with self.ledger.clock("data wait"):
            return next(steps, None)

    def train_step(self, batches: StepBatches) -> None:
        """One optimizer step: the loss is the mean over the masked tokens of all ranks and micro-batches.

        A step that would do harm is skipped, and its loss does not count.
        """
        state, plan = self.state, self.plan
        self.schedule.set_rates(self.engine.optimizer.param_groups, state.position)
        before = snapshot_moments(state, self.engine)
        self.stop.listen()
        work = self.stop.add_up(batches.counts)  # the only reduction beside DeepSpeed's own
        state.work += work[:3]
        step_loss = torch.zeros_like(state.loss_sum)
        taken = optimizer_step(self.engine, self.losses(batches.micro_batches, work[0], step_loss))
        if taken:
            state.loss_sum += step_loss
            state.steps_in_loss += 1
        self.health.count(taken)
        self.watchdog.beat()
        state.position.advance(plan.sequences, plan.sequence_length)
        self.ledger.add_step(tokens=plan.sequences * plan.sequence_length)
        if before is not None:
            observe_growth(self.metrics, before, taken=taken)

    def losses(self, micro_batches: list[Batch], masked: Tensor, step_loss: Tensor) -> Iterator[Tensor]:
        """What each micro-batch differentiates; its part of the step's loss is added to `step_loss`."""
        for number, batch in enumerate(micro_batches, 1):
            loss = self.loss(self.engine, batch.to(self.device, non_blocking=True), masked)
            step_loss += loss.detach()
            # DeepSpeed averages gradients over ranks; the loss is a part of the global mean, so that is undone.
            weight = self.health.factor(step_loss) if number == len(micro_batches) else 1.0
            yield loss * dist.get_world_size() * weight

    def loss(self, engine: Engine, batch: Batch, masked: Tensor) -> Tensor:
        """This micro-batch's part of the global batch's mean loss; with next-sentence prediction the sum of both."""
        output = engine(**batch.inputs)
        loss = output.loss_sum / masked
        if output.next_sentence_loss_sum is not None:
            loss = loss + output.next_sentence_loss_sum / self.plan.sequences
        return loss

    def report(self) -> None:
        """Log, show, evaluate and save where it is time to, and stop where somebody asks."""
        position, config = self.state.position, self.config
        if self.state.skipped_in_a_row:
            self.metrics.log(self.health.describe())
            end_if_hopeless(self.health, self.plan, self.manager, self.writer, self.run_dir)
        last = not self.state.steps_left
        if position.step % config.log_every == 0 or last:
            self.log_training()
        last = self.evaluate_if_due() or last
        if config.checkpoint_every and position.step % config.checkpoint_every == 0 and not last:
            self.save()
        self.stop_if_asked()

    def log_training(self) -> None:
        """Log the steps since the last line."""
        position = self.state.position
        self.metrics.log_training(self.schedule(position.step - 1, position.stage, position.stage_step - 1))

    def evaluate_if_due(self) -> bool:
        """Evaluate every `eval_every` steps and once after a growth; a stage's end is evaluated when it closes.

        Returns whether the loss has ended the stage by the trigger `plateau`.
        """
        every, position = self.config.eval_every, self.state.position
        regular = every and position.step % every == 0
        after_growth = position.stage and position.stage_step == self.config.eval_after_growth
        if not (regular or after_growth) or self.state.steps_left <= 0:
            return False
        ended = end_on_plateau(self.metrics, self.evaluation.evaluate().all_positions)
        if ended and self.state.steps_in_loss:
            self.log_training()  # a stage ends with a line
        return ended

    def poll(self) -> None:
        """Between the micro-batches of an evaluation: a sign of life, and whether somebody asked to stop."""
        self.watchdog.beat()
        self.stop.listen()
        self.stop.ask()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Save and raise RunAgain, on all ranks, where they know that any of them was asked to stop."""
        if not self.stop.told:
            return
        # in a growth the checkpoint of the stage's end is this very step's, and the growth is made again
        if not self.state.growing:
            self.save(required=True)
        saved = self.writer.wait()
        log_failed_saves(self.writer, self.metrics.log)
        stopped = f"stopped by {self.stop.request.reason or 'another rank'} at step {self.state.position.step}"
        if not saved:  # no RunAgain: a batch script would start it again and again, for nothing
            raise RunFailed(f"{stopped}, but the last checkpoint could not be saved; go on with --resume auto")
        raise RunAgain(f"{stopped}, saved; go on with --resume auto")

    def save(self, *, stage_end: bool = False, required: bool = False) -> None:
        """Save the run between two steps. Collective."""
        save(self.metrics, self.writer, self.run_dir, stage_end=stage_end, required=required)

    def close_stage(self, stage: StageConfig) -> None:
        """Evaluate, export and save the stage's model."""
        loss = self.evaluation.evaluate()
        refuse_diverged(loss, self.state.position, self.writer)
        self.ledger.stage.eval_loss_end = loss.all_positions
        self.ledger.stage.eval_loss_masked_end = loss.masked
        fault = self.export(stage)
        failed = bool(make_exchange(self.device).all_reduce_sum(int(fault is not None)))
        self.save(stage_end=not failed, required=failed)
        if failed:  # the stage's work is saved first, and a resumption exports again
            self.writer.wait()
            raise fault or OtherRankFailed("rank 0 could not export the stage's model")
        self.stop.ask()
        self.stop.listen()
        self.stop_if_asked()

    def export(self, stage: StageConfig) -> Exception | None:
        """Write the current stage's model; what is to be said where that failed on this rank."""
        number, alive = self.state.position.stage, self.watchdog.beat
        return try_export(self.run_dir, number, stage.layers, self.manager, self.config.model, self.data, alive)
