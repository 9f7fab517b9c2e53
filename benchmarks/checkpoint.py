"""Saving and loading BERT-base with optimizer state: our checkpoints beside DeepSpeed's, in the same process.

    LOCAL_SIZE=2 deepspeed --num_gpus 2 benchmarks/checkpoint.py

Prints one JSON line. Figures are medians over rounds of the slowest rank's seconds; both contenders take turns, and
the first round, in which memory is touched for the first time, is not counted. `blocking` is how long a save keeps the
training loop; `save` lasts until the checkpoint is published. Ours is then on the disk (fsync) and hashed; DeepSpeed's
is in the page cache, and `save_synced` adds the fsync of its files. Our `load` reads and compares every hash first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.checkpoint.select import find_together
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.config import ModelConfig, OptimizerConfig
from ds_stacking.engine.factory import EngineFactory, EngineSpec, device, init_distributed
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.plan import copy_plan
from ds_stacking.growth.state import KINDS
from ds_stacking.models.bert import Bert

Seconds = dict[str, list[float]]


def start(options: argparse.Namespace) -> StageManager:
    """BERT-base with a random state."""
    hidden = 64 if options.small else 768
    model = ModelConfig(hidden_size=hidden, num_heads=hidden // 64, vocab_size=30528, norm="post")
    factory = EngineFactory(
        build_model=lambda layers, initialize: Bert(model, layers, initialize=False),
        ds_config={"zero_optimization": {"stage": options.zero_stage}},
        optimizer=OptimizerConfig(),
        bf16=True,
    )
    manager = StageManager(factory)
    manager.start(EngineSpec(layers=12, micro_batch_size=1))
    state = LiveState(manager.engine)
    for piece in state.slices():
        for kind in KINDS:
            state.read(piece, kind).normal_().abs_()
    state.commit(dict.fromkeys(manager.parameters, 10))
    return manager


def timed(seconds: Seconds, name: str, action: Callable[[], Any]) -> Any:
    """Run `action`; the slowest rank's time counts."""
    dist.barrier()
    begin = time.perf_counter()
    result = action()
    elapsed = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=device())
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    seconds[name].append(float(elapsed))
    return result


def ours(manager: StageManager, folder: Path, writer: CheckpointWriter, step: int, seconds: Seconds) -> None:
    """One save in the background, waited for, and one load with all checks."""
    state = LiveState(manager.engine)

    def save() -> None:
        timed(seconds, "ours_blocking", lambda: writer.save(step, state, manager.current_parameters(), extra={}))
        assert writer.wait(), [report.error for report in writer.reports()]

    timed(seconds, "ours_save", save)

    def load() -> None:
        found = find_together(folder / "ours", make_exchange(device()), identity={})
        assert found is not None and found.step == step
        reader = CheckpointReader(found.path)
        plan = copy_plan(reader.parameters, find_blocks(manager.engine.module))
        execute(plan, reader, state, make_exchange(device()))

    timed(seconds, "ours_load", load)


def theirs(engine: DeepSpeedEngine, folder: Path, step: int, seconds: Seconds) -> None:
    """DeepSpeed's save_checkpoint, which blocks all the way, and load_checkpoint."""
    path, tag = str(folder / "deepspeed"), f"step-{step}"
    timed(seconds, "deepspeed_save", lambda: engine.save_checkpoint(path, tag=tag))
    timed(seconds, "deepspeed_fsync", lambda: dist.get_rank() == 0 and _sync(folder / "deepspeed" / tag))
    timed(seconds, "deepspeed_load", lambda: engine.load_checkpoint(path, tag=tag))
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "deepspeed")


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def size(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def report(seconds: Seconds, manager: StageManager, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures, the ratios, and where they were measured."""
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    parameters = sum(info.numel for info in manager.parameters.values())
    last = max((folder / "ours").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    synced = median["deepspeed_save"] + median.pop("deepspeed_fsync")
    return {
        "zero_stage": options.zero_stage,
        "ranks": dist.get_world_size(),
        "rounds": options.rounds,
        **{name: round(value, 3) for name, value in median.items()},
        "deepspeed_save_synced": round(synced, 3),
        "blocking_ratio": round(median["ours_blocking"] / median["deepspeed_save"], 3),
        "save_ratio": round(median["ours_save"] / median["deepspeed_save"], 3),
        "save_synced_ratio": round(median["ours_save"] / synced, 3),
        "load_ratio": round(median["ours_load"] / median["deepspeed_load"], 3),
        "first_blocking": round(seconds["ours_blocking"][0], 3),
        "bytes_per_parameter": round(size(last) / parameters, 4),
        "parameters": parameters,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "device": str(device()),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def main() -> None:
    """Take turns, then print."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--small", action="store_true", help="64 wide, to try the script")
    options = parser.parse_args()
    init_distributed()
    shared = [tempfile.mkdtemp(dir=options.folder)] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    manager, seconds = start(options), defaultdict(list)
    writer = CheckpointWriter(folder / "ours", make_exchange(device()), identity={}, keep=1)
    for step in range(1, options.rounds + 2):
        ours(manager, folder, writer, step, seconds)
        theirs(manager.engine, folder, step, seconds)
    if dist.get_rank() == 0:
        print(json.dumps(report(seconds, manager, folder, options)), flush=True)
        shutil.rmtree(folder)
    dist.barrier()


if __name__ == "__main__":
    main()
