"""Starts real ranks for tests: processes forked from one that has already imported torch and deepspeed.

A case is a module-level function that every rank calls; what it returns comes back by rank.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

context = multiprocessing.get_context("forkserver")
"""A process has one server: this is the only list of what it has imported, since the last one given holds for all."""
context.set_forkserver_preload(
    ["torch", "deepspeed", "ds_stacking.engine.stage_manager", "ds_stacking.models.bert", "ds_stacking.training.run"]
    # what DeepSpeed and torch import only when they are used, seconds on every rank
    + ["torch._dynamo", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer"]
    # and what the launchers do
    + ["transformers", "transformers.models.bert.modeling_bert", "sklearn.feature_extraction.text"]
    + ["transformers.models.megatron_bert.modeling_megatron_bert", "matplotlib.pyplot"]
    + ["ds_stacking.studies.attention.run", "ds_stacking.studies.glue.run", "ds_stacking.studies.comparison.report"]
    + ["ds_stacking.data.preparation.folder", "ds_stacking.checkpoint.grow"]
)


def run_ranks(world_size: int, case: Callable[..., Any], *args: Any, timeout: float = 900) -> list[Any]:
    """Call `case(*args)` on `world_size` ranks of a gloo group; returns the results by rank.

    Raises AssertionError with the rank's traceback where one failed, or where they did not end in `timeout` seconds.
    """
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            context.Process(target=run_rank, args=(rank, world_size, store, case, args, results), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            outcome = _collect(results, processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [outcome[rank] for rank in range(world_size)]


def _collect(results: Any, processes: list, timeout: float) -> dict[int, Any]:
    outcome: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(outcome) < len(processes):
        try:
            rank, value, error = results.get(timeout=1)
        except queue.Empty:
            dead = [p.exitcode for rank, p in enumerate(processes) if rank not in outcome and p.exitcode is not None]
            assert not dead, f"a rank died with exit code {dead[0]}"
            assert time.monotonic() < end, f"the ranks did not end in {timeout} s"
            continue
        assert error is None, f"rank {rank}:\n{error}"
        outcome[rank] = value
    return outcome


def run_rank(rank: int, world_size: int, store: str, case: Callable[..., Any], args: tuple, results: Any) -> None:
    """Be one rank of a gloo group: the result of `case`, or its traceback, goes into `results`."""
    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),  # else DeepSpeed counts one device on a CPU
    }
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        assert dist.get_world_size() == world_size
        from ds_stacking.engine.factory import init_distributed

        init_distributed()
        value = case(*args)
        dist.barrier()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)
