"""A pre-training run from its configuration: prepare, build, train, finish."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_stacking.checkpoint.select import Found
from ds_stacking.checkpoint.share import from_first_rank, side_by_side
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.environment import rank, world_size
from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.common.explain import keep_tracebacks
from ds_stacking.config import ModelConfig, RunConfig, StageConfig
from ds_stacking.data.batches import EvalBatches, MaskedBatches
from ds_stacking.data.masking import Masker
from ds_stacking.data.mixture import Mixture
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.prepared_data import PreparedData, sampled_fingerprint
from ds_stacking.data.token_file import Split
from ds_stacking.engine.ds_config import load_ds_config, resolve_ds_config
from ds_stacking.engine.factory import EngineFactory, device, init_distributed, native_bf16
from ds_stacking.engine.host import keep_freed_memory, limit_threads
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.growth.triggers import parse_trigger
from ds_stacking.models.bert import Bert, has_kernels
from ds_stacking.models.compiling import compile_parts
from ds_stacking.planning.gpus import gpu_spec_of
from ds_stacking.training.alarm import Alarm
from ds_stacking.training.batching import BatchPlan, plan_batch
from ds_stacking.training.capacity import refuse_what_cannot_fit
from ds_stacking.training.changes import describe, refuse_another_finished_run
from ds_stacking.training.checkpointing import (
    changed_settings,
    find_checkpoint,
    identity,
    make_writer,
    metrics_bytes,
    restore,
)
from ds_stacking.training.finish import finish
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.loop import Pretraining
from ds_stacking.training.metrics import check_metrics, cut_metrics
from ds_stacking.training.micro_batch import choose_micro_batches, recorded_micro_batches
from ds_stacking.training.ownership import one_writer
from ds_stacking.training.preemption import StopRequest
from ds_stacking.training.progress import make_console
from ds_stacking.training.run_directory import (
    check_run_directory,
    claim_run_directory,
    give_back,
    is_finished,
    remove_stop_files,
    set_umask,
)
from ds_stacking.training.same_data import check_same_data
from ds_stacking.training.tracking import NullTracker, check_run_id, make_tracker
from ds_stacking.training.triggering import check_plateau, triggered_stages
from ds_stacking.training.watchdog import Watchdog, collective_limit

FITTED_BLOCKS = 1024
"""Training blocks that the one weight of the controls is fitted on: some thousand predicted positions."""


def pretrain(config: RunConfig) -> None:
    """Run `config` to the end. Every rank calls it.

    What cannot start leaves the run directory as it was: nothing in it is written or deleted before an engine stands,
    and what a run wrote that fails in its first step is given back.
    """
    limit_threads()
    keep_freed_memory()
    init_distributed(limit=collective_limit(config.hang_timeout))
    with Alarm() as alarm:  # before the checks: nodes may see other files, and what one rank refuses ends all
        check_run_directory(config)
        console = make_console(rank())
        if from_first_rank(lambda: bool(config.resume and is_finished(config)), make_exchange(device())):
            refuse_another_finished_run(config)
            console.line(f"{config.run_dir} holds a finished run; there is nothing left to do.")
            return
        ds_config = load_ds_config(config.deepspeed_config)
        bf16, why = _precision(config)
        plans = check_stages(config, ds_config, bf16=bf16, world_size=world_size())
        refuse_what_cannot_fit(config, ds_config, device(), bf16=bf16)
        # no collective call waits meanwhile, however long it takes: who waits for the data looks for them
        data = prepare(config.data, config.tokenizer, config.corpus, log=console.line)
        config = replace(config, model=_model_config(config.model, data))
        set_umask(config)
        check_same_data(sampled_fingerprint(data), config.data, device())
        with one_writer(config, console.line) as holds, Watchdog(config.hang_timeout) as watchdog:
            keep_tracebacks(Path(config.run_dir))
            run, found = _set_up(config, data, plans, ds_config, holds, watchdog, bf16=bf16)
            console.resolved(_resolved(run, why))
            alarm.undo = partial(_undo, run)
            try:
                stage_finished = _resume(run, found)
                _claim(run, found)
                run.train(stage_finished=stage_finished)
                finish(run)
            except BaseException as error:
                alarm.sound(error)  # before what may take seconds
                run.close(exit_code=1)
                _undo(run)
                raise
            alarm.close()
            run.close()


def _set_up(
    config: RunConfig,
    data: PreparedData,
    plans: list[BatchPlan],
    ds_config: Mapping[str, Any],
    holds: Callable[[], bool],
    watchdog: Watchdog,
    *,
    bf16: bool,
) -> tuple[Pretraining, Found | None]:
    """The run and the checkpoint that it goes on from, with all that only the process group's ranks could decide."""
    if config.kernels == "auto":
        config = replace(config, kernels="fused" if has_kernels(device()) else "torch")
    config = replace(config, stages=triggered_stages(config))
    expected = identity(config, data.fingerprint)
    found = find_checkpoint(config, expected, watchdog.beat)
    changes = from_first_rank(lambda: changed_settings(config, found), make_exchange(device()))
    words = from_first_rank(lambda: _look_at_what_stays(config, found), make_exchange(device()))
    if words is not None and found is not None:
        found = replace(found, notes=(*found.notes, f"{words}."))
    resumed = found is not None and not found.branch
    config = _micro_batches(config, data, plans, ds_config, bf16=bf16, resumed=resumed)
    watchdog.beat()
    plans = check_stages(config, ds_config, bf16=bf16, world_size=dist.get_world_size())
    writer = make_writer(config, expected, found, holds)
    return _build(config, data, plans, ds_config, writer, changes, watchdog, bf16=bf16), found


def _resume(run: Pretraining, found: Found | None) -> bool:
    """Bring the run to its checkpoint, or build the first engine; whether it stands at the end of a stage."""
    if found is None:
        if run.config.resume:
            run.console.line("no checkpoint yet; starting at step 0")
        run.open_stage(0, run.stages[0])
        return False
    for note in found.notes:
        run.console.line(note)
    stage_finished = restore(run, found)
    run.console.line(f"{'branching off' if found.branch else 'resumed'} at step {found.step}, from {found.path}")
    new = {change["field"]: (change["from"], change["to"]) for change in run.changes if change["step"] == found.step}
    if new:
        run.console.line(f"changed at step {found.step}: {describe(new)}")
    return stage_finished


def _undo(run: Pretraining) -> None:
    """Rank 0: what a new run has written before its first step goes, so that the mended command finds nothing."""
    if run.rank == 0 and run.position.step == run.claimed_at:
        give_back(run.run_dir, run.claimed)


def _claim(run: Pretraining, found: Found | None) -> None:
    """Make the run directory this run's, now that it can start: what was there before is deleted or gone on with."""
    asked = make_exchange(run.device).all_reduce_sum(int(run.stop.asked()))
    if asked:
        if run.stop.reason == "SIGINT":
            raise KeyboardInterrupt
        raise RunAgain(f"stopped by {run.stop.reason or 'another rank'} before its first step; start it again")
    keep = found is not None and not found.branch
    size = metrics_bytes(run.run_dir, found)
    run.claimed_at = None if keep else run.position.step

    def claim() -> None:
        if run.rank == 0:
            record = _record(run.config, run.data) | {"changes": run.changes}
            run.claimed = claim_run_directory(run.config, record, keep=keep)
            if size is not None:
                cut_metrics(run.run_dir, size)

    side_by_side(claim, make_exchange(run.device))  # --overwrite may have much to delete
    config = run.config
    run.tracker = make_tracker(
        run.run_dir, tracking=config.tracking, name=config.name, config=config.to_dict(), rank=run.rank
    )


def _look_at_what_stays(config: RunConfig, found: Found | None) -> str | None:
    """Rank 0: what of the run directory a resumption goes on with is checked before; what is to be said of it."""
    run_dir = Path(config.run_dir)
    remove_stop_files(run_dir)
    if found is not None and not found.branch and config.tracking == "wandb":
        check_run_id(run_dir)
    size = metrics_bytes(run_dir, found)
    return None if size is None else check_metrics(run_dir, size)


def _precision(config: RunConfig) -> tuple[bool, str]:
    """Whether to train in bf16, and why."""
    if config.precision != "auto":
        return config.precision == "bf16", "as asked"
    native, why = native_bf16()
    return native, why


def check_stages(config: RunConfig, ds_config: Mapping[str, Any], *, bf16: bool, world_size: int) -> list[BatchPlan]:
    """The batch arithmetic of every stage. Raises UserError for a growth or a batch that cannot be."""
    stages = config.stages
    assert isinstance(stages, list)
    parse_operator(config.operator)  # a misspelt one is an error even where nothing grows
    tried = parse_trigger(config.trigger).operators
    check_plateau(config)
    for before, after in zip(stages, stages[1:], strict=False):
        for operator in tried or (after.operator or config.operator,):
            layer_map(operator, before.layers, after.layers)
    plans = [plan_batch(config, stage, world_size) for stage in stages]
    for stage, plan in zip(stages, plans, strict=True):
        resolved = resolve_ds_config(
            dict(ds_config),
            zero_stage=stage.zero_stage,
            bf16=bf16,
            clip=config.optimizer.clip,
            micro_batch_size=plan.micro_batch_size,
            accumulation=plan.accumulation,
            world_size=world_size,
        )
        if config.compile and resolved["zero_optimization"]["stage"] == 3:
            raise UserError(
                f"Stage {stage.layers}:{stage.steps} asks for compile with ZeRO stage 3, which gathers weights inside "
                f"the model where no graph can; choose ZeRO stage 0, 1 or 2, or turn compile off."
            )
    return plans


def _model_config(model: ModelConfig, data: PreparedData) -> ModelConfig:
    """The model with its vocabulary: the tokenizer's, rounded up to a multiple of 8 for the matrix units."""
    if model.vocab_size == 0:
        return replace(model, vocab_size=-(-data.vocab_size // 8) * 8)
    if model.vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {data.vocab_size}; "
            f"raise it, or leave it at 0."
        )
    return model


def _model(config: RunConfig, layers: int, initialize: bool) -> Bert:
    """The model of a stage; its weights are drawn or left unfilled."""
    model = Bert(config.model, layers, initialize=initialize, fused=config.kernels == "fused")
    if config.compile:
        compile_parts(model)
    return model


def _blocks(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """What the batches of both splits share."""
    corpus = config.corpus
    return {
        "masker": Masker(
            special=data.special, vocab_size=data.vocab_size, unit=corpus.masking, continues=data.continuing
        ),
        "special": data.special,
        "next_sentence": config.model.next_sentence,
        "separate_documents": corpus.separate_documents,
    }


def _batches(config: RunConfig, data: PreparedData, plans: list[BatchPlan]) -> dict[int, MaskedBatches]:
    """The training batches by sequence length."""
    return {
        length: MaskedBatches(
            data.train,
            sequence_length=length,
            seed=config.seed,
            masking_rate=config.corpus.masking_rate,
            masking_rate_end=config.corpus.masking_rate_end,
            samples=_samples(config, plans),
            **_blocks(config, data),
        )
        for length in {plan.sequence_length for plan in plans}
    }


def _evaluation(config: RunConfig, data: PreparedData, split: Split | Mixture, blocks: int) -> EvalBatches:
    """Blocks of a split with masks that stay: those of the evaluation, and training text for its controls."""
    return EvalBatches(
        split,
        sequences=blocks,
        sequence_length=config.corpus.sequence_length,
        masking_rate=config.corpus.masking_rate_end or config.corpus.masking_rate,
        **_blocks(config, data),
    )


def _micro_batches(
    config: RunConfig,
    data: PreparedData,
    plans: list[BatchPlan],
    ds_config: Mapping[str, Any],
    *,
    bf16: bool,
    resumed: bool,
) -> RunConfig:
    """The configuration with a number for every micro-batch: recorded by the run, or measured now."""
    assert isinstance(config.stages, list)
    if "auto" not in [config.micro_batch_size, *(stage.micro_batch_size for stage in config.stages)]:
        return config
    known = recorded_micro_batches(config, device()) if resumed else None
    batches = _batches(config, data, plans)
    return known or choose_micro_batches(
        config,
        partial(_model, config),
        lambda length, samples: batches[length].batch(samples),
        zero_stage=ds_config["zero_optimization"]["stage"],
        bf16=bf16,
        device=device(),
    )


def _build(
    config: RunConfig,
    data: PreparedData,
    plans: list[BatchPlan],
    ds_config: Mapping[str, Any],
    writer: CheckpointWriter,
    changes: list[dict[str, Any]],
    watchdog: Watchdog,
    *,
    bf16: bool,
) -> Pretraining:
    run_dir = Path(config.run_dir)
    factory = EngineFactory(
        build_model=partial(_model, config),
        ds_config=ds_config,
        optimizer=config.optimizer,
        bf16=bf16,
        layer_by_layer=True,
    )
    batches = _batches(config, data, plans)
    return Pretraining(
        config=config,
        data=data,
        manager=StageManager(factory, seed=config.seed, growth_memory=config.growth_memory),
        batches=batches,
        held_out=_evaluation(config, data, data.eval, config.eval_sequences),
        training_text=_evaluation(config, data, data.train, FITTED_BLOCKS),
        plans=plans,
        ledger=Ledger(peak=_peak()),
        console=make_console(dist.get_rank()),
        tracker=NullTracker(),
        run_dir=run_dir,
        device=device(),
        writer=writer,
        stop=StopRequest(run_dir),
        changes=changes,
        watchdog=watchdog,
    )


def _peak() -> float | None:
    """Dense bf16 peak of all GPUs of the run, if the part is known."""
    part = gpu_spec_of(torch.cuda.get_device_name()) if device().type == "cuda" else None
    return part.bf16 * dist.get_world_size() if part else None


def _samples(config: RunConfig, plans: list[BatchPlan]) -> int:
    """Training samples of the whole run."""
    assert isinstance(config.stages, list)
    return sum(plan.sequences * stage.steps for plan, stage in zip(plans, config.stages, strict=True))


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
        "ranks": f"{run.world_size} on {run.device.type}",
        "engine": f"ZeRO stage {factory.ds_config['zero_optimization']['stage']} ({config.deepspeed_config})",
        "precision": f"{'bf16' if factory.bf16 else 'fp32'} ({why})",
        "kernels": config.kernels + (", the rest compiled" if config.compile else ""),
        "model": f"{model.norm}-LN BERT, width {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        "data": f"{config.data}: {len(data.train):,} tokens for training, {len(data.eval):,} held out, "
        f"unigram entropy {data.unigram_entropy:.2f} nat",
        "evaluation": f"{len(run.held_out):,} held-out blocks, fingerprint {run.held_out.fingerprint()}",
        "batch": " then ".join(dict.fromkeys(plan.describe() for plan in run.plans)),
        "stages": ", ".join(_stage_text(config, stage, i) for i, stage in enumerate(run.stages)),
        "schedule": f"{config.schedule}, peak {config.lr:g}"
        if all(stage.lr is None for stage in run.stages)
        else "by stage",
    }


def _stage_text(config: RunConfig, stage: StageConfig, index: int) -> str:
    text = f"{stage.layers} layers x {stage.steps:,} steps"
    if index:
        operator, state = stage.operator or config.operator, stage.optimizer_state or config.optimizer_state
        text += f" (grown: {operator}, optimizer state {state})"
    return text
