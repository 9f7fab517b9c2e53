"""The plan as a person reads it, with what it assumes."""

from __future__ import annotations

from dataclasses import replace

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig
from ds_stacking.planning.calibration import Calibration
from ds_stacking.planning.estimate import Cluster, StagePlan, saved_share
from ds_stacking.planning.gpus import GpuSpec

BUCKET = 50_000_000
"""reduce_bucket_size of ds_configs/."""
MOST_GPUS = 1_000_000
VOCABULARY = 30_528
"""Rows of the embedding where the tokenizer is not known before the run: BERT's, rounded up."""


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The configuration with a vocabulary, which a run takes from its tokenizer.

    Raises UserError for one that is smaller than that of the tokenizer which the run will train.
    """
    if config.model.vocab_size:
        if config.tokenizer == "train" and config.model.vocab_size < config.corpus.vocab_size:
            raise UserError(
                f"model.vocab_size {config.model.vocab_size} is smaller than corpus.vocab_size "
                f"{config.corpus.vocab_size}, which the tokenizer will have; raise it, or leave it at 0."
            )
        return config
    size = config.corpus.vocab_size if config.tokenizer == "train" else VOCABULARY
    return replace(config, model=replace(config.model, vocab_size=-(-size // 8) * 8))


def make_cluster(gpu: GpuSpec, *, nodes: int, gpus_per_node: int, mfu: float) -> Cluster:
    """Raises UserError for sizes that cannot be."""
    if nodes < 1 or gpus_per_node < 1:
        raise UserError(f"{nodes} nodes of {gpus_per_node} GPUs cannot be planned; both must be positive.")
    if nodes * gpus_per_node > MOST_GPUS:
        raise UserError(
            f"{nodes:,} nodes of {gpus_per_node:,} GPUs cannot be planned; give {MOST_GPUS:,} in all or less."
        )
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu}; it is a share of the peak, in (0, 1].")
    return Cluster(gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node, mfu=mfu, bucket=BUCKET)


def plan_table(config: RunConfig, plans: list[StagePlan], cluster: Cluster) -> str:
    """Per stage a block of lines, then the totals."""
    lengths = [config.length_of(stage) for stage in config.stages]
    sequences = " then ".join(str(length) for length in dict.fromkeys(lengths))
    lines = [f"{config.name} on {cluster.nodes} x {cluster.gpus_per_node} GPUs, bf16, sequences of {sequences} tokens"]
    for number, (plan, length) in enumerate(zip(plans, lengths, strict=True), 1):
        lines += ["", *_stage_lines(plan, number, cluster, length)]
    seconds = sum(plan.seconds for plan in plans)
    lines += [
        "",
        f"in all {_hours(seconds)}, {seconds / 3600 * cluster.gpus:,.1f} GPU hours{_saved(plans)}",
        f"assumed, not measured on this gpu: MFU {cluster.mfu:.0%} of the arithmetic; links and network as sold, "
        f"latencies as in NCCL's own model",
    ]
    return "\n".join(lines)


def _saved(plans: list[StagePlan]) -> str:
    """What growing saves, in words; nothing where nothing grows."""
    saved, deep = saved_share(plans), f"at {plans[-1].layers} layers"
    if len(plans) == 1:
        return ""
    if saved >= 0:
        return f"; stacking saves {saved:.1%} of the time of as many steps {deep}"
    return (
        f"; stacking saves nothing here: it takes {1 - saved:,.4g} times as long as training {deep} "
        f"from the start, since the growths take {sum(plan.growth_seconds for plan in plans):,.1f} s"
    )


def _stage_lines(plan: StagePlan, number: int, cluster: Cluster, length: int) -> list[str]:
    tokens = plan.micro_batch_size * plan.accumulation * length
    lines = [
        f"stage {number}: {plan.layers} layers, {plan.steps:,} steps, {plan.parameters / 1e6:,.1f} M parameters, "
        f"ZeRO stage {plan.zero_stage}",
        f"  batch          {plan.accumulation} micro-batches of {plan.micro_batch_size} sequences on each GPU",
    ]
    for zero_stage, memory in plan.memory.items():
        fits = "" if memory.total <= cluster.gpu.memory else "  DOES NOT FIT"
        lines.append(
            f"  memory ZeRO-{zero_stage}  {_gib(memory.total)} = states {_gib(memory.states)}, activations "
            f"{_gib(memory.activations)}, buffers {_gib(memory.buffers)}{fits}"
        )
    talking, step = plan.communication_seconds * 1e3, plan.step_seconds
    return [
        *lines,
        f"  communication  {_gib(plan.communication_bytes)} a step and GPU, {talking:,.1f} ms",
        f"  step           {step * 1e3:,.1f} ms, {tokens / step / 1e3:,.0f} k tokens/s a GPU",
        f"  growth         {plan.growth_seconds:.1f} s",
        f"  stage          {_hours(plan.seconds)}",
    ]


def calibration_table(found: Calibration) -> str:
    """How well the stages of a finished run predict one another."""
    rows = zip(found.layers, found.measured, found.predicted, found.errors, strict=True)
    lines = [f"\na finished run, {found.clock}; each stage predicted from the others"]
    lines += [
        f"  {layers} layers: {measured * 1e3:,.1f} ms a step, predicted {predicted * 1e3:,.1f} ms, error {error:+.1%}"
        for layers, measured, predicted, error in rows
    ]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h"
