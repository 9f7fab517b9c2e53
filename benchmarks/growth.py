"""Growing BERT-base from 6 to 12 layers, with optimizer state: our two ways beside DeepSpeed's universal checkpoints.

    LOCAL_SIZE=2 deepspeed --num_gpus 2 benchmarks/growth.py

Prints one JSON line per ZeRO stage. Building models and engines is counted on no side, verification on ours. `online`
moves the state between two engines; `checkpoint` saves ours, grows it on the disk and loads it; `universal` is
DeepSpeed's save_checkpoint, ds_to_universal, a copy of the blocks' folders, load_checkpoint. `copy` is a torch copy
into new memory of the bytes that the online growth writes. Memory is rank 0's, in bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.checkpoint.grow import grow_folder
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.config import ModelConfig, OptimizerConfig
from ds_stacking.engine.factory import EngineFactory, EngineSpec, device, init_distributed
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.plan import copy_plan
from ds_stacking.growth.state import KINDS
from ds_stacking.models.bert import Bert

STEP = 10


class TogetherFactory(EngineFactory):
    """Ranks leave the building of an engine together, so that none waits for the other in what is measured."""

    def build(self, *args: Any, **options: Any) -> DeepSpeedEngine:
        engine = super().build(*args, **options)
        dist.barrier()
        return engine


def make_factory(zero_stage: int, options: argparse.Namespace, **extra: Any) -> EngineFactory:
    """BERT-base's shape, or a small one to try the script."""
    hidden = 64 if options.small else 768
    model = ModelConfig(hidden_size=hidden, num_heads=hidden // 64, vocab_size=30528, norm="post")
    return TogetherFactory(
        build_model=lambda layers, initialize: Bert(model, layers, initialize=False),
        ds_config={"zero_optimization": {"stage": zero_stage}, **extra},
        optimizer=OptimizerConfig(),
        bf16=True,
    )


def start(zero_stage: int, options: argparse.Namespace, layers: int = 6) -> StageManager:
    """An engine of so many layers with a random state."""
    manager = StageManager(make_factory(zero_stage, options))
    manager.start(EngineSpec(layers=layers, micro_batch_size=1))
    state = LiveState(manager.engine)
    for piece in state.slices():
        for kind in KINDS:
            state.read(piece, kind).normal_().abs_()
    state.commit(dict.fromkeys(manager.parameters, STEP))
    return manager


def timed(seconds: dict[str, float], name: str, action: Callable[[], Any]) -> Any:
    """Run `action` between two barriers."""
    dist.barrier()
    begin = time.perf_counter()
    result = action()
    dist.barrier()
    seconds[name] = round(time.perf_counter() - begin, 3)
    return result


def reset_peak_memory() -> int:
    """Let `peak_memory` begin anew; the bytes that this rank holds now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Most bytes that this rank held since: of the device, or resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def free(engine: DeepSpeedEngine) -> None:
    release(engine)
    collect()


def online(zero_stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """Our growth between engines."""
    manager = start(zero_stage, options)
    before = reset_peak_memory()
    record = manager.grow(EngineSpec(layers=12, micro_batch_size=1))
    peak = peak_memory()
    phases = {name: round(value, 3) for name, value in record.seconds_by_phase.items()}
    build = phases.pop("build")
    memory_after = reset_peak_memory()
    source = torch.ones(record.bytes_moved // 4)
    copied: dict[str, float] = {}
    timed(copied, "copy", source.clone)
    free(manager.engine)
    return {
        "online": round(sum(phases.values()), 3),
        "online_phases": phases,
        "build": build,
        "bytes_per_rank": record.bytes_moved,
        "bytes_received": record.bytes_received,
        "memory_before": before,
        "memory_peak": peak,
        "memory_after": memory_after,
        **copied,
    }


def checkpoint(zero_stage: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our checkpoint, growth on the disk, our checkpoint."""
    manager = start(zero_stage, options)
    seconds: dict[str, float] = {}
    writer = CheckpointWriter(folder / "small", make_exchange(device()), identity={})

    def save() -> None:
        writer.save(STEP, LiveState(manager.engine), manager.current_parameters(), extra={})
        writer.close()

    timed(seconds, "save", save)
    free(manager.engine)

    def grow() -> None:
        if dist.get_rank() == 0:
            grow_folder(folder / "small", folder / "big", operator="stack", layers=12)

    timed(seconds, "grow", grow)
    reader = CheckpointReader(folder / "big" / f"step-{STEP}")
    engine = manager.factory.build(EngineSpec(layers=12, micro_batch_size=1), reader.parameters, initialize=False)
    plan = copy_plan(reader.parameters, find_blocks(engine.module))
    timed(seconds, "load", lambda: execute(plan, reader, LiveState(engine), make_exchange(device())))
    free(engine)
    return {"checkpoint": round(sum(seconds.values()), 3), "checkpoint_phases": seconds}


def universal(zero_stage: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What DeepSpeed offers."""
    manager = start(zero_stage, options)
    seconds: dict[str, float] = {}
    timed(seconds, "save", lambda: manager.engine.save_checkpoint(str(folder / "ds"), tag="small"))
    free(manager.engine)
    arguments = argparse.Namespace(
        input_folder=str(folder / "ds" / "small"),
        output_folder=str(folder / "ds" / "big"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    timed(seconds, "convert", lambda: dist.get_rank() == 0 and ds_to_universal.main(arguments))
    timed(seconds, "edit", lambda: dist.get_rank() == 0 and _copy_blocks(folder / "ds" / "big" / "zero"))
    factory = make_factory(zero_stage, options, checkpoint={"load_universal": True})
    engine = factory.build(EngineSpec(layers=12, micro_batch_size=1))
    load = {"load_module_strict": False} if zero_stage < 3 else {}
    timed(seconds, "load", lambda: engine.load_checkpoint(str(folder / "ds"), tag="big", **load))
    free(engine)
    return {"universal": round(sum(seconds.values()), 3), "universal_phases": seconds}


def _copy_blocks(zero: Path) -> None:
    for path in sorted(zero.iterdir()):
        parts = path.name.split(".", 2)
        if parts[0] == "blocks":
            shutil.copytree(path, zero / f"blocks.{int(parts[1]) + 6}.{parts[2]}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed's tools print much."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def attempt(action: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The figures of one way, or why there are none."""
    try:
        return action(*args)
    except Exception as error:
        return {action.__name__: None, f"{action.__name__}_error": f"{type(error).__name__}: {error}"[:200]}


def main() -> None:
    """All ways for all ZeRO stages."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--zero_stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--small", action="store_true", help="64 wide, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))))
    init_distributed()
    small = argparse.Namespace(**vars(options) | {"small": True})
    measure(options.zero_stages[0], small)  # what loads and connects at first use is in nobody's figures
    for zero_stage in options.zero_stages:
        result = measure(zero_stage, options)
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
    sys.stdout.flush()


def measure(zero_stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """All ways under one ZeRO stage."""
    shared = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    with quiet():
        result = {"zero_stage": zero_stage, "ranks": dist.get_world_size()}
        result |= online(zero_stage, options)
        result |= attempt(checkpoint, zero_stage, options, folder)
        result |= attempt(universal, zero_stage, options, folder)
    if result.get("universal"):
        result["times_faster_than_universal"] = round(result["universal"] / result["online"], 1)
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    software = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "machine": platform.machine()}
    return result | software


if __name__ == "__main__":
    main()
