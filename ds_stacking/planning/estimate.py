"""Seconds of a stage: arithmetic, communication, optimizer, growth.

A rate (model FLOPs per second and GPU, all but communication and optimizer included) is assumed as an MFU, or taken
from a finished run by `Calibration`. Collectives are in collectives.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig
from ds_stacking.models.flops import training_flops
from ds_stacking.planning.collectives import Collective, all_gather, bytes_sent, calls_of_step, latency
from ds_stacking.planning.gpus import GpuSpec
from ds_stacking.planning.memory import (
    Memory,
    activation_bytes,
    buffer_bytes,
    parameter_count,
    state_bytes,
    sum_bytes,
)

REBUILD = 3.0
"""Seconds in which a growth builds a model and an engine, whatever their size."""
HOST = 30e-6
"""Seconds of the host per parameter tensor, in a backward pass (which the GPU hides if it works longer) and in a
step: DeepSpeed's hooks and loops, measured on a CPU with tensors of 16 elements."""
MOST_STEPS = 10**12
MOST_SEQUENCES = 1 << 22
LARGEST_MICRO_BATCH = 1 << 16
"""Optimizer steps of a stage, sequences of a step, and sequences that a GPU may hold: far beyond what there is."""
OPTIMIZER_TRAFFIC = 56
"""Bytes per weight of a step in DeepSpeed's optimizer: AdamW's 30 and what copies around it take."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run is planned for."""

    gpu: GpuSpec
    """The GPU."""
    nodes: int
    """Nodes."""
    gpus_per_node: int
    """GPUs of each."""
    mfu: float
    """Share of the GPU's bf16 peak that forward and backward passes reach."""
    bucket: int
    """DeepSpeed's reduce_bucket_size."""

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    def seconds(self, collectives: Iterable[Collective]) -> float:
        """Seconds of collective calls over all GPUs, one after the other."""
        if self.gpus == 1:
            return 0.0
        speed = min(self.gpu.link, self.gpu.network) if self.nodes > 1 else self.gpu.link
        seconds = 0.0
        for calls in collectives:
            wait = latency(calls.kind, nodes=self.nodes, gpus_per_node=self.gpus_per_node, link=self.gpu.link)
            seconds += bytes_sent(calls, self.gpus) / speed + calls.calls * wait
        return seconds


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage on a cluster; bytes and FLOPs are those of one GPU."""

    layers: int
    steps: int
    parameters: int
    zero_stage: int
    micro_batch_size: int
    accumulation: int
    memory: dict[int, Memory]
    """By ZeRO stage."""
    flops: float
    """Model FLOPs of one step."""
    communication_bytes: float
    """Sent by one GPU in one step."""
    communication_seconds: float
    step_seconds: float
    growth_seconds: float
    """Of the growth into this stage; 0 for the first."""

    @property
    def seconds(self) -> float:
        """The whole stage."""
        return self.growth_seconds + self.steps * self.step_seconds


def check_sizes(config: RunConfig) -> None:
    """Raise UserError for a run so large that planning it would not end."""
    for stage in config.stages:
        sequences = (stage.tokens_per_step or config.tokens_per_step) // config.length_of(stage)
        if sequences > MOST_SEQUENCES:
            raise UserError(f"A step of {sequences:.3g} sequences cannot be planned; lower --tokens_per_step.")
        if stage.steps > MOST_STEPS:
            raise UserError(
                f"A stage of {float(str(stage.steps)[:300]):.3g} or more steps cannot be planned; give fewer."
            )


def plan_stage(config: RunConfig, stage: StageConfig, cluster: Cluster, *, zero_stage: int, first: bool) -> StagePlan:
    """Plan one stage in bf16. Raises UserError where the sequences of a step do not divide by the GPUs."""
    zero_stage = zero_stage if stage.zero_stage is None else stage.zero_stage
    length = config.length_of(stage)
    sequences = (stage.tokens_per_step or config.tokens_per_step) // length
    if sequences % cluster.gpus:
        raise UserError(
            f"{sequences} sequences of a step do not divide by {cluster.gpus} GPUs; give --tokens_per_step a multiple "
            f"of {cluster.gpus * length:,}."
        )
    parameters, share = parameter_count(config.model, stage.layers), sequences // cluster.gpus
    memory_of = {
        size: _memory(config, stage, parameters, cluster, size, zero_stage, sums=size < share)
        for size in _divisors(share)
    }
    limit = stage.micro_batch_size or config.micro_batch_size
    micro = _micro_batch({size: m.total for size, m in memory_of.items()}, limit, cluster)
    accumulation = share // micro
    flops = training_flops(
        config.model,
        stage.layers,
        sequences=share,
        length=length,
        masked=share * length * config.corpus.masking_rate,
    )
    collectives = calls_of_step(parameters, zero_stage=zero_stage, accumulation=accumulation, bucket=cluster.bucket)
    talking = cluster.seconds(collectives)
    host = HOST * (12 * stage.layers + 10)  # tensors of a block, and of embeddings and heads
    computing = max(flops / (cluster.mfu * cluster.gpu.bf16), accumulation * host)
    updated = parameters / (cluster.gpus if zero_stage else 1)
    updating = updated * OPTIMIZER_TRAFFIC / cluster.gpu.bandwidth
    together = max(computing, talking) if zero_stage == 3 else computing + talking  # only ZeRO-3's overlaps
    moved = 12 * parameters / cluster.gpus
    growing = REBUILD + moved / cluster.gpu.bandwidth + cluster.seconds([all_gather(moved, 1)])
    return StagePlan(
        layers=stage.layers,
        steps=stage.steps,
        parameters=parameters,
        zero_stage=zero_stage,
        micro_batch_size=micro,
        accumulation=accumulation,
        memory={s: _memory(config, stage, parameters, cluster, micro, s, sums=accumulation > 1) for s in range(4)},
        flops=flops,
        communication_bytes=sum(bytes_sent(call, cluster.gpus) for call in collectives),
        communication_seconds=talking,
        step_seconds=together + updating + host,
        growth_seconds=0.0 if first else growing,
    )


def plan_run(config: RunConfig, cluster: Cluster, *, zero_stage: int) -> list[StagePlan]:
    """Plan every stage of a run; raises UserError as `plan_stage` does."""
    return [
        plan_stage(config, stage, cluster, zero_stage=zero_stage, first=index == 0)
        for index, stage in enumerate(config.stages)
    ]


def saved_share(plans: list[StagePlan]) -> float:
    """Share of the time that the same number of steps at the last depth would take."""
    scratch = sum(plan.steps for plan in plans) * plans[-1].step_seconds
    return 1 - sum(plan.seconds for plan in plans) / scratch


def _memory(
    config: RunConfig,
    stage: StageConfig,
    parameters: int,
    cluster: Cluster,
    micro: int,
    zero_stage: int,
    *,
    sums: bool,
) -> Memory:
    tokens, layers = micro * config.length_of(stage), stage.layers
    shared = {"zero_stage": zero_stage, "world_size": cluster.gpus, "item": 2}
    return Memory(
        states=state_bytes(parameters, **shared) + sum_bytes(parameters, **shared, accumulates=sums),
        activations=activation_bytes(
            config.model,
            layers,
            tokens=tokens,
            masked=tokens * config.corpus.masking_rate,
            item=2,
            fused=config.kernels != "torch",
        ),
        buffers=buffer_bytes(parameters, bucket=cluster.bucket, **shared),
    )


def _micro_batch(bytes_of: dict[int, float], limit: int | str, cluster: Cluster) -> int:
    """The largest micro-batch within the limit that leaves a tenth of the memory free, or the smallest of all."""
    fits = [size for size, total in bytes_of.items() if total <= 0.9 * cluster.gpu.memory]
    return max((size for size in fits if limit == "auto" or size <= int(limit)), default=1)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, min(number, LARGEST_MICRO_BATCH) + 1) if number % size == 0]
