"""What a run works with, built from its configuration: batches, models, its state and the checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_stacking.checkpoint.select import Found
from ds_stacking.checkpoint.share import from_first_rank
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.environment import world_size
from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig, RunConfig
from ds_stacking.data.batches import EvalBatches, MaskedBatches
from ds_stacking.data.masking import Masker
from ds_stacking.data.mixture import Mixture
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.data.token_file import Split
from ds_stacking.engine.ds_config import resolve_ds_config
from ds_stacking.engine.factory import EngineFactory, device
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.growth.triggers import parse_trigger
from ds_stacking.models.bert import Bert
from ds_stacking.models.compiling import compile_parts
from ds_stacking.models.variants import bert_class
from ds_stacking.planning.gpus import gpu_spec_of
from ds_stacking.training.batching import BatchPlan, plan_batch
from ds_stacking.training.checkpointing import (
    changed_settings,
    find_checkpoint,
    metrics_bytes,
)
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.loop import Pretraining
from ds_stacking.training.metrics import Metrics
from ds_stacking.training.metrics_file import check_metrics
from ds_stacking.training.micro_batch import choose_micro_batches, recorded_micro_batches
from ds_stacking.training.preemption import SharedStop, StopRequest
from ds_stacking.training.progress import Console
from ds_stacking.training.run_directory import CHECKPOINTS, SAVED, remove_stop_files
from ds_stacking.training.state import TrainState
from ds_stacking.training.tiles import read_tiles
from ds_stacking.training.tracking import check_run_id
from ds_stacking.training.triggering import check_plateau
from ds_stacking.training.watchdog import Watchdog

FITTED_SEQUENCES = 1024
"""Training sequences that the one weight of the controls is fitted on: some thousand predicted positions."""


def check_stages(config: RunConfig, ds_config: Mapping[str, Any], *, bf16: bool, world_size: int) -> list[BatchPlan]:
    """The batch arithmetic of every stage. Raises UserError for a growth or a batch that cannot be."""
    stages = config.stages
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


def with_vocabulary(model: ModelConfig, data: PreparedData) -> ModelConfig:
    """The model with its vocabulary: the tokenizer's, rounded up to a multiple of 8 for the matrix units."""
    if model.vocab_size == 0:
        return replace(model, vocab_size=-(-data.vocab_size // 8) * 8)
    if model.vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {data.vocab_size}; "
            f"raise it, or leave it at 0."
        )
    return model


def make_model(config: RunConfig, layers: int, initialize: bool) -> Bert:
    """The model of a stage; its weights are drawn or left unfilled."""
    model = bert_class(config.kernels == "fused")(config.model, layers, initialize=initialize)
    if config.precision == "fp8":
        from ds_stacking.models.fp8 import use_fp8

        use_fp8(model)
    if config.compile:
        compile_parts(model)
    return model


def _masking(config: RunConfig, data: PreparedData) -> dict[str, Any]:
    """What the batches of both splits are made with."""
    corpus = config.corpus
    return {
        "masker": Masker(
            special=data.special, vocab_size=data.vocab_size, unit=corpus.masking, continues=data.continuing
        ),
        "special": data.special,
        "next_sentence": config.model.next_sentence,
        "separate_documents": corpus.separate_documents,
    }


def make_batches(config: RunConfig, data: PreparedData, plans: list[BatchPlan]) -> dict[int, MaskedBatches]:
    """The training batches by sequence length."""
    return {
        length: MaskedBatches(
            data.train,
            sequence_length=length,
            seed=config.seed,
            masking_rate=config.corpus.masking_rate,
            masking_rate_end=config.corpus.masking_rate_end,
            samples=sum(plan.sequences * stage.steps for plan, stage in zip(plans, config.stages, strict=True)),
            **_masking(config, data),
        )
        for length in {plan.sequence_length for plan in plans}
    }


def make_eval_batches(config: RunConfig, data: PreparedData, split: Split | Mixture, sequences: int) -> EvalBatches:
    """Sequences of a split with masks that stay: those of the evaluation, and training text for its controls."""
    return EvalBatches(
        split,
        sequences=sequences,
        sequence_length=config.corpus.sequence_length,
        masking_rate=config.corpus.masking_rate_end or config.corpus.masking_rate,
        **_masking(config, data),
    )


def make_factory(config: RunConfig, ds_config: Mapping[str, Any], *, bf16: bool) -> EngineFactory:
    """What builds the engines of all stages."""
    return EngineFactory(
        build_model=partial(make_model, config),
        ds_config=ds_config,
        optimizer=config.optimizer,
        bf16=bf16,
        layer_by_layer=True,
    )


def settle_micro_batches(
    config: RunConfig, data: PreparedData, plans: list[BatchPlan], factory: EngineFactory, *, resumed: bool
) -> RunConfig:
    """The configuration with a number for every micro-batch: recorded by the run, or measured now."""
    if "auto" not in [config.micro_batch_size, *(stage.micro_batch_size for stage in config.stages)]:
        return config
    known = recorded_micro_batches(config, device()) if resumed else None
    batches = make_batches(config, data, plans)
    return known or choose_micro_batches(
        config,
        partial(make_model, config),
        lambda length, samples: batches[length].batch(samples),
        zero_stage=factory.ds_config["zero_optimization"]["stage"],
        bf16=factory.bf16,
        device=device(),
    )


def look_for_checkpoint(
    config: RunConfig, expected: dict[str, Any], alive: Callable[[], None]
) -> tuple[Found | None, list[dict[str, Any]]]:
    """The checkpoint that the run goes on from, and every setting that changed in the run's life. Collective."""
    found = find_checkpoint(config, expected, alive)
    changes = from_first_rank(lambda: changed_settings(config, found), make_exchange(device()))
    words = from_first_rank(lambda: _look_at_what_stays(config, found), make_exchange(device()))
    if words is not None and found is not None:
        found = replace(found, notes=(*found.notes, f"{words}."))
    return found, changes


def build_run(
    config: RunConfig,
    data: PreparedData,
    factory: EngineFactory,
    changes: list[dict[str, Any]],
    writer: CheckpointWriter,
    watchdog: Watchdog,
    console: Console,
) -> Pretraining:
    """The run, without an engine and a tracker yet."""
    plans = check_stages(config, factory.ds_config, bf16=factory.bf16, world_size=world_size())
    manager = StageManager(factory, seed=config.seed, growth_memory=config.growth_memory)
    state = TrainState(device=device(), stage_steps=[stage.steps for stage in config.stages], changes=changes)
    ledger = Ledger(peak=_peak())
    return Pretraining(
        config=config,
        state=state,
        metrics=Metrics(config=config, plans=plans, state=state, manager=manager, console=console, ledger=ledger),
        data=data,
        batches=make_batches(config, data, plans),
        held_out=make_eval_batches(config, data, data.eval, config.eval_sequences),
        training_text=make_eval_batches(config, data, data.train, FITTED_SEQUENCES),
        plans=plans,
        manager=manager,
        writer=writer,
        stop=SharedStop(StopRequest(Path(config.run_dir)), state.device),
        watchdog=watchdog,
    )


def make_writer(
    config: RunConfig, expected: dict[str, Any], found: Found | None, holds: Callable[[], bool]
) -> CheckpointWriter:
    """The writer of a run that goes on from the checkpoint `found`."""
    return CheckpointWriter(
        Path(config.run_dir) / CHECKPOINTS,
        make_exchange(device()),
        identity=expected,
        keep=config.checkpoint_keep,
        asynchronous=config.checkpoint_async,
        holds=holds,
        record=Path(config.run_dir) / SAVED,
        verified=[found.path] if found is not None else (),
    )


def _look_at_what_stays(config: RunConfig, found: Found | None) -> str | None:
    """Rank 0: what of the run directory a resumption goes on with is checked before; what is to be said of it."""
    run_dir = Path(config.run_dir)
    remove_stop_files(run_dir)
    if found is not None and not found.branch and config.tracking == "wandb":
        check_run_id(run_dir)
    if found is not None and not found.branch:
        read_tiles(run_dir)
    size = metrics_bytes(run_dir, found)
    return None if size is None else check_metrics(run_dir, size)


def _peak() -> float | None:
    """Dense bf16 peak of all GPUs of the run, if their kind is known."""
    gpu = gpu_spec_of(torch.cuda.get_device_name()) if device().type == "cuda" else None
    return gpu.bf16 * world_size() if gpu else None
