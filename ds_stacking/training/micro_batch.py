"""`micro_batch_size` "auto": of the sizes that fit, the fastest for each stage, measured once before the first stage.

Shallow stages keep less for the backward pass and take larger micro-batches; the global batch stays what the recipe
says. Measured are forward and backward passes on real sequences; that the engine's states fit beside them is computed.
What was chosen stands in the run's config.json, from which a resumed run takes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ds_stacking.checkpoint.share import from_first_rank
from ds_stacking.config import LARGEST_COUNT, RunConfig, StageConfig
from ds_stacking.data.batches import Batch
from ds_stacking.engine.release import collect
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.models.bert import Bert
from ds_stacking.planning.memory import state_bytes, sum_bytes
from ds_stacking.training.changes import read_config

HEADROOM = 0.1
"""Share of the device's memory that stays free."""
REPEATS = 5
"""Passes per size, the first two of which warm up."""
Measure = Callable[[Bert, Batch, torch.device], float]
PATIENCE = 2
"""Sizes in a row that may be slower before no larger one is tried."""


def sizes_to_try(share: int) -> list[int]:
    """Divisors of a rank's sequences per step, each at least half as large again as the one before."""
    chosen: list[int] = []
    for size in range(1, share + 1):
        if share % size == 0 and (not chosen or size >= 1.5 * chosen[-1] or size == share):
            chosen.append(size)
    return chosen


def fastest(rate_of: Callable[[int], float], sizes: list[int]) -> int:
    """The size of the highest rate; `rate_of` returns 0 where a size does not fit, and no larger one is tried."""
    rates: dict[int, float] = {}
    slower = 0
    for size in sizes:
        rate = rate_of(size)
        if not rate:
            break
        slower = slower + 1 if rates and rate <= max(rates.values()) else 0
        rates[size] = rate
        if slower == PATIENCE:
            break
    return max(rates, key=lambda size: rates[size]) if rates else sizes[0]


def seconds_of_a_pass(model: Bert, batch: Batch, device: torch.device) -> float:
    """Median seconds of a forward and backward pass."""
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(REPEATS):
        start = time.perf_counter()
        model(**batch.inputs).loss_sum.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def choose_micro_batches(
    config: RunConfig,
    build_model: Callable[[int, bool], Bert],
    read: Callable[[int, np.ndarray], Batch],
    *,
    zero_stage: int,
    bf16: bool,
    device: torch.device,
    measure: Measure = seconds_of_a_pass,
) -> RunConfig:
    """The configuration with a number in place of every "auto". All ranks call it together and get the same.

    `measure` returns the seconds of a forward and backward pass.
    """
    stages = []
    for stage in config.stages:
        asked = stage.micro_batch_size or config.micro_batch_size
        if asked == "auto":
            share = (stage.tokens_per_step or config.tokens_per_step) // config.length_of(stage)
            sizes = sizes_to_try(share // dist.get_world_size())
            model = build_model(stage.layers, True).to(device, torch.bfloat16 if bf16 else torch.float32).train()
            stage_zero = zero_stage if stage.zero_stage is None else stage.zero_stage
            shared = {"zero_stage": stage_zero, "world_size": dist.get_world_size(), "item": 2 if bf16 else 4}
            states = state_bytes(model.num_parameters, **shared)
            states += sum_bytes(model.num_parameters, **shared, accumulates=True)
            asked = fastest(
                partial(_rate, measure, model, partial(read, config.length_of(stage)), states, device),
                sizes,
            )
            del model
            collect()  # NCCL takes its memory beside torch's, which would keep all that was tried
        stages.append(replace(stage, micro_batch_size=asked))
    largest = max(int(stage.micro_batch_size or 0) for stage in stages)
    return replace(config, stages=stages, micro_batch_size=largest)


def recorded_micro_batches(config: RunConfig, device: torch.device) -> RunConfig | None:
    """The configuration with the sizes that the run chose before it stopped; None where its config.json has none."""
    sizes = from_first_rank(lambda: _read(Path(config.run_dir), config.stages), make_exchange(device))
    if not all(sizes):
        return None
    stages = [replace(stage, micro_batch_size=size) for stage, size in zip(config.stages, sizes, strict=True)]
    return replace(config, stages=stages, micro_batch_size=max(sizes))


def _read(run_dir: Path, stages: list[StageConfig]) -> list[int]:
    """Sizes in the run's config.json; zeros where it has none for these stages."""
    saved = (read_config(run_dir) or {}).get("stages", [])
    found = [stage.get("micro_batch_size") for stage in saved]
    fine = len(found) == len(stages) and all(isinstance(size, int) and 0 < size <= LARGEST_COUNT for size in found)
    return found if fine else [0] * len(stages)


def _rate(
    measure: Measure, model: Bert, read: Callable[[np.ndarray], Batch], states: float, device: torch.device, size: int
) -> float:
    """Sequences per second of the slowest rank; 0 where a rank runs out of memory."""
    seconds, fits = float("inf"), True
    try:
        seconds = measure(model, read(np.arange(size)).to(device), device)
        fits = _peak(device) + states <= (1 - HEADROOM) * _capacity(device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error).lower():
            raise
        fits = False
    model.zero_grad()
    slowest = torch.tensor([seconds if fits else float("inf")], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return size / float(slowest)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _capacity(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
