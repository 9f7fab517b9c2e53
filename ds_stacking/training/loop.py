"""The training loop: stages, steps, evaluations, growths.

Losses, norms and counts stay on the device and are read when a line is logged, and whether somebody asked to stop is
known a step later, so no step waits for the host or for another rank's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import OtherRankFailed, RunAgain, RunFailed, UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.data.batches import Batch, EvalBatches, MaskedBatches
from ds_stacking.data.prefetch import prefetch
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.engine.consolidate import gather_masters
from ds_stacking.engine.factory import Engine, EngineSpec
from ds_stacking.engine.stage_manager import GrowthRecord, StageManager
from ds_stacking.engine.stepping import optimizer_step
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.training.batching import BatchPlan
from ds_stacking.training.checkpointing import log_failed_saves, save
from ds_stacking.training.export import export_stage
from ds_stacking.training.growth_report import note_later_loss, observe_growth, snapshot_moments
from ds_stacking.training.health import Health
from ds_stacking.training.held_out import HeldOutLoss, held_out_loss
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.preemption import LaterSum, StopRequest
from ds_stacking.training.progress import StageConsole
from ds_stacking.training.reporting import check_health, log_evaluation, log_growth, log_training, refuse_diverged
from ds_stacking.training.schedule import Schedule
from ds_stacking.training.tracking import Tracker
from ds_stacking.training.triggering import choose_operator, end_on_plateau
from ds_stacking.training.watchdog import Watchdog

SECONDS_AFTER_A_FAILURE = 10.0
"""How long a failed run waits for the save under way."""


@dataclass(kw_only=True)
class Position:
    """Where a run stands."""

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


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What an optimizer step of this rank learns from, on the host."""

    micro_batches: list[Batch]
    """In the order in which they are used."""
    counts: Tensor
    """Predicted tokens, pairs that see each other of all tokens and of these, whether to stop: [4] int64."""


@dataclass(kw_only=True)
class Pretraining:
    """One run: everything it works with, and where it stands."""

    config: RunConfig
    data: PreparedData
    manager: StageManager
    batches: dict[int, MaskedBatches]
    """Training batches by sequence length."""
    held_out: EvalBatches
    training_text: EvalBatches
    """Blocks of the training split, masked as the held-out ones: what the controls are fitted on."""
    plans: list[BatchPlan]
    """Batch arithmetic by stage."""
    ledger: Ledger
    console: StageConsole
    tracker: Tracker
    run_dir: Path
    device: torch.device
    writer: CheckpointWriter
    stop: StopRequest
    watchdog: Watchdog
    position: Position = field(default_factory=Position)
    growths: list[GrowthRecord] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that resumptions changed."""
    claimed_at: int | None = None
    """The step at which a new run took its directory; where it makes no step more, it gives all back."""
    claimed: tuple[str, ...] = ()
    """What it made in it then."""

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.config)
        self.health = Health(
            limit=self.config.max_skipped_steps, sigma=self.config.skip_above_sigma, device=self.device
        )
        self.manager.evaluate = lambda _: self.evaluate().all_positions
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.steps_in_loss = 0
        self.work = torch.zeros(3, dtype=torch.int64, device=self.device)  # of the steps not yet in the ledger
        self.asked = LaterSum(self.device)  # ranks that were asked to stop
        self.settled = 0
        self.growing = self.told = False
        self.evaluated: tuple[tuple[int, int], HeldOutLoss] | None = None
        self.held_out_losses: list[tuple[float, float]] = []  # FLOPs and loss of the stage's evaluations, for plateau

    @property
    def stages(self) -> list[StageConfig]:
        """The run's stages."""
        assert isinstance(self.config.stages, list)
        return self.config.stages

    @property
    def engine(self) -> Engine:
        """The current stage's engine."""
        return self.manager.engine

    def close(self, exit_code: int = 0) -> None:
        """End what runs in the background."""
        self.watchdog.close()
        self.console.close()
        self.writer.close(SECONDS_AFTER_A_FAILURE if exit_code else None)
        self.tracker.close(exit_code)

    def train(self, *, stage_finished: bool = False) -> None:
        """Run all stages, from where the run stands, to the end.

        After a resumption an engine is there already; `stage_finished` says that its stage is over.
        """
        first = self.position.stage + stage_finished
        resumed = bool(self.manager.parameters) and not stage_finished
        for index, stage in list(enumerate(self.stages))[first:]:
            if not resumed:
                self.open_stage(index, stage)
            resumed = False
            self.train_stage(index, stage)
            self.close_stage(index, stage)

    def train_stage(self, index: int, stage: StageConfig) -> None:
        """The optimizer steps of a stage that are left."""
        done = self.position.stage_step
        self.console.start_stage(
            stage=index, stages=len(self.stages), layers=stage.layers, steps=stage.steps, done=done
        )
        if done:
            self.evaluate_if_due(stage)  # the run may have been stopped in this very evaluation
        with closing(self.stream(stage.steps - done)) as steps:
            while self.position.stage_step < stage.steps and (batches := self._next(steps)):
                with self.ledger.clock("training"):
                    self.train_step(batches)
                self.report(stage)

    def spec(self, index: int) -> EngineSpec:
        """The engine of a stage."""
        stage, plan = self.stages[index], self.plans[index]
        return EngineSpec(
            layers=stage.layers,
            micro_batch_size=plan.micro_batch_size,
            accumulation=plan.accumulation,
            zero_stage=stage.zero_stage,
        )

    def open_stage(self, index: int, stage: StageConfig) -> None:
        """Build the first engine, or grow into the stage's."""
        self.ledger.start_stage(stage.layers)
        self.position.stage, self.position.stage_step = index, 0
        self.held_out_losses = []
        if index == 0:
            self.manager.start(self.spec(0))
            self.seed_dropout()
        else:
            self.grow(index, stage, self.spec(index))

    def seed_dropout(self) -> None:
        """Dropout differs between ranks, and between where a run begins and where other ranks took it over."""
        torch.manual_seed(((self.config.seed * 1_000_003 + self.position.step) * 65_537 + self.rank) % 2**63)

    def grow(self, index: int, stage: StageConfig, spec: EngineSpec) -> None:
        """One growth, told to the console and the tracker."""
        self.growing = True
        operator = choose_operator(self, stage, spec)
        with self.ledger.clock("growth"):
            record = self.manager.grow(
                spec,
                operator=operator,
                optimizer_state=stage.optimizer_state or self.config.optimizer_state,
            )
        self.growing = False
        self.growths.append(record)
        log_growth(self, record)

    def train_step(self, batches: StepBatches) -> None:
        """One optimizer step: the loss is the mean over the masked tokens of all ranks and micro-batches.

        A step that would do harm is skipped, and its loss does not count.
        """
        stage = self.position.stage
        self.set_learning_rate()
        before = snapshot_moments(self)
        self.told = self.told or self.asked.read() > 0
        work = self.reduce(batches)
        step_loss = torch.zeros_like(self.loss_sum)
        taken = optimizer_step(self.engine, self.losses(batches.micro_batches, work[0], step_loss))
        if taken:
            self.loss_sum += step_loss
            self.steps_in_loss += 1
        self.health.count(taken)
        self.watchdog.beat()
        self.position.step += 1
        self.position.stage_step += 1
        plan = self.plans[stage]
        self.position.samples += plan.sequences
        length, counted = str(plan.sequence_length), self.position.by_length
        self.position.by_length = counted | {length: counted.get(length, 0) + plan.sequences}
        self.ledger.add_step(tokens=plan.sequences * plan.sequence_length)
        if before is not None:
            observe_growth(self, before, taken=taken)

    def reduce(self, batches: StepBatches) -> Tensor:
        """The step's counts over all ranks, [4] int64 on the device: the only reduction beside DeepSpeed's own."""
        if self.stop.asked():
            batches.counts[3] = 1
        work = batches.counts.to(self.device, non_blocking=True)
        dist.all_reduce(work)
        self.work += work[:3]
        self.asked.send(work[3:])
        return work

    def losses(self, micro_batches: list[Batch], masked: Tensor, step_loss: Tensor) -> Iterator[Tensor]:
        """What each micro-batch differentiates; its part of the step's loss is added to `step_loss`."""
        for number, batch in enumerate(micro_batches, 1):
            loss = self.loss(self.engine, batch.to(self.device, non_blocking=True), masked)
            step_loss += loss.detach()
            # DeepSpeed averages gradients over ranks; the loss is a part of the global mean, so that is undone.
            weight = self.health.factor(step_loss) if number == len(micro_batches) else 1.0
            yield loss * self.world_size * weight

    def loss(self, engine: Engine, batch: Batch, masked: Tensor) -> Tensor:
        """This micro-batch's part of the global batch's mean loss; with next-sentence prediction the sum of both."""
        output = engine(**batch.inputs)
        loss = output.loss_sum / masked
        if output.next_sentence_loss_sum is not None:
            loss = loss + output.next_sentence_loss_sum / self.plans[self.position.stage].sequences
        return loss

    def set_learning_rate(self) -> None:
        """Give every parameter group the rate of this step; the newest blocks may still be warming up."""
        position = self.position
        rate = self.schedule(position.step, position.stage, position.stage_step)
        newest = self.schedule.newest(position.stage, position.stage_step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * (newest if position.stage and group["birth"] == position.stage else 1.0)

    def report(self, stage: StageConfig) -> None:
        """Log, show, evaluate and save where it is time to, and stop where somebody asks."""
        position, config = self.position, self.config
        if self.health.in_a_row:
            check_health(self)
        last = position.stage_step == stage.steps
        if position.step % config.log_every == 0 or last:
            log_training(self)
        last = self.evaluate_if_due(stage) or last
        if config.checkpoint_every and position.step % config.checkpoint_every == 0 and not last:
            save(self)
        self.stop_if_asked(self.told)

    def evaluate_if_due(self, stage: StageConfig) -> bool:
        """Evaluate every `eval_every` steps and once after a growth; a stage's end is evaluated when it closes.

        Returns whether the loss has ended the stage by the trigger `plateau`.
        """
        every, position = self.config.eval_every, self.position
        regular = every and position.step % every == 0
        after_growth = position.stage and position.stage_step == self.config.eval_after_growth
        if not (regular or after_growth) or position.stage_step >= stage.steps:
            return False
        ended = end_on_plateau(self, stage, self.evaluate().all_positions)
        if ended and self.steps_in_loss:
            log_training(self)  # a stage ends with a line
        return ended

    def poll(self) -> None:
        """Between the micro-batches of an evaluation: a sign of life, and the same question."""
        self.watchdog.beat()
        self.told = self.told or self.asked.read() > 0
        self.ask()
        self.stop_if_asked(self.told)

    def ask(self) -> None:
        """Add up over the ranks whether they were asked to stop; `asked` knows later."""
        asked = torch.full((1,), int(self.stop.asked()), dtype=torch.int64, device=self.device)
        dist.all_reduce(asked)
        self.asked.send(asked)

    def stop_if_asked(self, told: bool) -> None:
        """Save and raise RunAgain, on all ranks, where they were `told` that any of them was asked to stop."""
        if not told:
            return
        # in a growth the checkpoint of the stage's end is this very step's, and the growth is made again
        if not self.growing:
            save(self, required=True)
        saved = self.writer.wait()
        log_failed_saves(self)
        stopped = f"stopped by {self.stop.reason or 'another rank'} at step {self.position.step}"
        if not saved:  # no RunAgain: a batch script would start it again and again, for nothing
            raise RunFailed(f"{stopped}, but the last checkpoint could not be saved; go on with --resume auto")
        raise RunAgain(f"{stopped}, saved; go on with --resume auto")

    def evaluate(self) -> HeldOutLoss:
        """Held-out loss of the current engine; the same step at the same depth is not evaluated twice."""
        layers = len(self.engine.module.blocks)
        at = (self.position.step, layers)
        if self.evaluated is None or self.evaluated[0] != at:
            self.evaluated = (at, self.held_out_loss())
            log_evaluation(self, self.evaluated[1])
        note_later_loss(self)
        return self.evaluated[1]

    def evaluate_shuffled(self) -> HeldOutLoss:
        """The control: the same blocks with their tokens shuffled."""
        return self.held_out_loss(shuffled=True)

    def held_out_loss(self, *, shuffled: bool = False) -> HeldOutLoss:
        """Held-out loss of the current engine, neither logged nor remembered."""
        size = self.config.micro_batch_size
        assert size != "auto", "chosen before the first stage"
        with self.ledger.clock("evaluation"):
            return held_out_loss(
                self.engine,
                self.held_out,
                micro_batch_size=size,
                device=self.device,
                shuffled=shuffled,
                poll=self.poll,
            )

    def close_stage(self, index: int, stage: StageConfig) -> None:
        """Evaluate and export the stage's model."""
        loss = self.evaluate()
        refuse_diverged(self, loss)
        self.ledger.stage.eval_loss_end = loss.all_positions
        self.ledger.stage.eval_loss_masked_end = loss.masked
        fault = self.export(index, stage)
        failed = bool(make_exchange(self.device).all_reduce_sum(int(fault is not None)))
        save(self, stage_end=not failed, required=failed)
        if failed:  # the stage's work is saved first, and a resumption exports again
            self.writer.wait()
            raise fault or OtherRankFailed("rank 0 could not export the stage's model")
        self.ask()
        self.stop_if_asked(self.told or self.asked.read() > 0)

    def export(self, index: int, stage: StageConfig) -> Exception | None:
        """Write the stage's model for `from_pretrained`; what is to be said where that failed on this rank."""
        try:
            export_stage(
                self.run_dir,
                stage=index,
                layers=stage.layers,
                tensors=self._masters(),
                model=self.config.model,
                data=self.data,
                writes=self.rank == 0,
            )
        except (OSError, RunFailed, UserError) as fault:
            return fault
        return None

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights for an export; each one that comes is a sign of life."""
        for item in gather_masters(self.engine, self.manager.parameters):
            self.watchdog.beat()
            yield item

    def stream(self, steps: int) -> Generator[StepBatches]:
        """This rank's micro-batches of the next `steps` steps, made ahead in the background."""
        plan, start = self.plans[self.position.stage], self.position.samples
        others = start - self.position.by_length.get(str(plan.sequence_length), 0)
        samples = (plan.samples(start + i * plan.sequences, self.rank) for i in range(steps))
        return prefetch(partial(self._make_step, others=others), samples)

    def _next(self, steps: Iterator[StepBatches]) -> StepBatches | None:
        with self.ledger.clock("data wait"):
            return next(steps, None)

    def _make_step(self, samples: list[np.ndarray], *, others: int) -> StepBatches:
        """A step's batches, after so many samples of other lengths."""
        source = self.batches[self.plans[self.position.stage].sequence_length]
        batches = [source.batch(indices, others) for indices in samples]
        counts = torch.tensor([(len(batch.labels), *batch.pairs, 0) for batch in batches]).sum(0)
        if self.device.type == "cuda":  # from page-locked memory a copy need not block
            batches, counts = [batch.pin_memory() for batch in batches], counts.pin_memory()
        return StepBatches(micro_batches=batches, counts=counts)
