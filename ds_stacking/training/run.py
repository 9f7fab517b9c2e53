"""A pre-training run from its configuration: prepare, build, train, finish."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ds_stacking.checkpoint.select import Found
from ds_stacking.checkpoint.share import from_first_rank, side_by_side
from ds_stacking.common.environment import rank, world_size
from ds_stacking.common.errors import RunAgain
from ds_stacking.common.failures import keep_tracebacks
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.prepared_data import PreparedData, sampled_fingerprint
from ds_stacking.engine.ds_config import load_ds_config
from ds_stacking.engine.factory import device, init_distributed
from ds_stacking.engine.host import keep_freed_memory, limit_threads
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.models.variants import has_kernels
from ds_stacking.training.alarm import Alarm
from ds_stacking.training.build import (
    build_run,
    check_stages,
    look_for_checkpoint,
    make_factory,
    make_writer,
    settle_micro_batches,
    with_vocabulary,
)
from ds_stacking.training.capacity import memory, refuse_what_cannot_fit
from ds_stacking.training.changes import describe, refuse_another_finished_run
from ds_stacking.training.checkpointing import identity, metrics_bytes, restore
from ds_stacking.training.finish import finish
from ds_stacking.training.loop import Pretraining
from ds_stacking.training.metrics_file import cut_metrics
from ds_stacking.training.ownership import one_writer
from ds_stacking.training.precision import choose_precision, precision_name
from ds_stacking.training.progress import Console, make_console
from ds_stacking.training.run_directory import (
    check_run_directory,
    claim_run_directory,
    give_back,
    is_finished,
    set_umask,
)
from ds_stacking.training.same_data import check_same_data
from ds_stacking.training.tiles import settle_tiles
from ds_stacking.training.tracking import make_tracker
from ds_stacking.training.triggering import triggered_stages
from ds_stacking.training.watchdog import Watchdog, collective_limit


@dataclass
class Claim:
    """What a new run has made in its directory before its first step, and gives back where it makes none."""

    step: int | None = None
    """That of the claim; None before it, and for a run that goes on."""
    made: tuple[str, ...] = ()

    def undo(self, run: Pretraining) -> None:
        """So that the mended command finds nothing."""
        if rank() == 0 and run.state.position.step == self.step:
            give_back(run.run_dir, self.made)


def pretrain(
    config: RunConfig,
    *,
    console: Console | None = None,
    on_built: Callable[[Pretraining], None] = lambda run: None,
) -> None:
    """Run `config` to the end. Every rank calls it.

    What cannot start leaves the run directory as it was: nothing in it is written or deleted before an engine stands,
    and what a run wrote that fails in its first step is given back. `on_built` gets the run before it has an engine.
    """
    limit_threads()
    keep_freed_memory()
    init_distributed(limit=collective_limit(config.hang_timeout))
    with Alarm() as alarm:  # before the checks: nodes may see other files, and what one rank refuses ends all
        check_run_directory(config)
        console = console or make_console(rank())
        if from_first_rank(lambda: bool(config.resume and is_finished(config)), make_exchange(device())):
            refuse_another_finished_run(config)
            console.log(f"{config.run_dir} holds a finished run; there is nothing left to do.")
            return
        ds_config = load_ds_config(config.deepspeed_config)
        bf16, why = choose_precision(config)
        plans = check_stages(config, ds_config, bf16=bf16, world_size=world_size())
        refuse_what_cannot_fit(config, ds_config, memory(device()), bf16=bf16)
        # no collective call waits meanwhile, however long it takes: who waits for the data looks for them
        data = prepare(config.data, config.tokenizer, config.corpus, log=console.log)
        config = replace(config, model=with_vocabulary(config.model, data))
        set_umask(config)
        check_same_data(sampled_fingerprint(data), config.data, device())
        with one_writer(config, console.log) as holds, Watchdog(config.hang_timeout) as watchdog:
            keep_tracebacks(Path(config.run_dir))
            if config.kernels == "auto":
                config = replace(config, kernels="fused" if has_kernels(device()) else "torch")
            config = replace(config, stages=triggered_stages(config))
            factory = make_factory(config, ds_config, bf16=bf16)
            expected = identity(config, data.fingerprint)
            found, changes = look_for_checkpoint(config, expected, watchdog.beat)
            resumed = found is not None and not found.branch
            config = settle_micro_batches(config, data, plans, factory, resumed=resumed)
            watchdog.beat()
            writer = make_writer(config, expected, found, holds)
            run = build_run(config, data, factory, changes, writer, watchdog, console)
            console.resolved(_resolved(run, why))
            _train(run, found, alarm, on_built)


def _train(run: Pretraining, found: Found | None, alarm: Alarm, on_built: Callable[[Pretraining], None]) -> None:
    """Start or go on, train and finish; where that fails before the first step, nothing is left."""
    claim = Claim()
    alarm.undo = partial(claim.undo, run)
    try:
        on_built(run)
        stage_finished = _resume(run, found)
        _claim(run, found, claim)
        _settle_tiles(run)
        run.train(stage_finished=stage_finished)
        finish(run)
    except BaseException as error:
        alarm.sound(error)  # before what may take seconds
        run.close(exit_code=1)
        claim.undo(run)
        raise
    alarm.close()
    run.close()


def _resume(run: Pretraining, found: Found | None) -> bool:
    """Bring the run to its checkpoint, or build the first engine; whether it stands at the end of a stage."""
    if found is None:
        if run.config.resume:
            run.metrics.log("no checkpoint yet; starting at step 0")
        run.open_stage(0, run.config.stages[0])
        return False
    for note in found.notes:
        run.metrics.log(note)
    stage_finished = restore(run.config, run.metrics, found)
    run.metrics.log(f"{'branching off' if found.branch else 'resumed'} at step {found.step}, from {found.path}")
    new = {
        change["field"]: (change["from"], change["to"]) for change in run.state.changes if change["step"] == found.step
    }
    if new:
        run.metrics.log(f"changed at step {found.step}: {describe(new)}")
    return stage_finished


def _claim(run: Pretraining, found: Found | None, claim: Claim) -> None:
    """Make the run directory this run's, now that it can start: what was there before is deleted or gone on with."""
    asked = make_exchange(run.device).all_reduce_sum(int(run.stop.request.asked()))
    if asked:
        if run.stop.request.reason == "SIGINT":
            raise KeyboardInterrupt
        raise RunAgain(f"stopped by {run.stop.request.reason or 'another rank'} before its first step; start it again")
    keep = found is not None and not found.branch
    size = metrics_bytes(run.run_dir, found)
    claim.step = None if keep else run.state.position.step

    def take() -> None:
        if rank() == 0:
            record = _record(run.config, run.data) | {"changes": run.state.changes}
            claim.made = claim_run_directory(run.config, record, keep=keep)
            if size is not None:
                cut_metrics(run.run_dir, size)

    side_by_side(take, make_exchange(run.device))  # --overwrite may have much to delete
    config = run.config
    run.metrics.tracker = make_tracker(
        run.run_dir, tracking=config.tracking, name=config.name, config=config.to_dict(), rank=rank()
    )


def _settle_tiles(run: Pretraining) -> None:
    """The same tiles on all ranks, before anything is computed; where no kernels run, nothing is settled."""
    if run.config.kernels != "fused" or not has_kernels(run.device):
        return
    settle_tiles(
        run.config,
        dict.fromkeys((plan.micro_batch_size, plan.sequence_length) for plan in run.plans),
        lambda length, samples: run.batches[length].batch(samples),
        run.device,
        torch.bfloat16 if run.manager.factory.bf16 else torch.float32,
        log=run.metrics.log,
        alive=run.watchdog.beat,
    )


def _record(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """What config.json holds: the resolved configuration, the data's digest and the software."""
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers", "tokenizers")}
    versions["python"] = platform.python_version()
    return config.to_dict() | {"data_fingerprint": data.fingerprint, "versions": versions}


def _resolved(run: Pretraining, why: str) -> dict[str, object]:
    """What a person reads before the start."""
    config, data = run.config, run.data
    factory = run.manager.factory
    model = config.model
    return {
        "run": f"{config.name} -> {run.run_dir}",
        "ranks": f"{world_size()} on {run.device.type}",
        "engine": f"ZeRO stage {factory.ds_config['zero_optimization']['stage']} ({config.deepspeed_config})",
        "precision": f"{precision_name(config, bf16=factory.bf16)} ({why})",
        "kernels": config.kernels + (", the rest compiled" if config.compile else ""),
        "model": f"{model.norm}-LN BERT, width {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        "data": f"{config.data}: {len(data.train):,} tokens for training, {len(data.eval):,} held out, "
        f"unigram entropy {data.unigram_entropy:.2f} nat",
        "evaluation": f"{len(run.held_out):,} held-out sequences, fingerprint {run.held_out.fingerprint()}",
        "batch": " then ".join(dict.fromkeys(plan.describe() for plan in run.plans)),
        "stages": ", ".join(_stage_text(config, stage, i) for i, stage in enumerate(config.stages)),
        "schedule": f"{config.schedule}, peak {config.lr:g}"
        if all(stage.lr is None for stage in config.stages)
        else "by stage",
    }


def _stage_text(config: RunConfig, stage: StageConfig, index: int) -> str:
    text = f"{stage.layers} layers x {stage.steps:,} steps"
    if index:
        operator, state = stage.operator or config.operator, stage.optimizer_state or config.optimizer_state
        text += f" (grown: {operator}, optimizer state {state})"
    return text
