"""Growth on the disk: a Hugging Face folder or a checkpoint of ours, by the plan and executor of a live growth."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ds_stacking.checkpoint.format import MANIFEST
from ds_stacking.checkpoint.huggingface import HuggingFaceReader, HuggingFaceWriter
from ds_stacking.checkpoint.offline import CheckpointState
from ds_stacking.checkpoint.select import find
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError
from ds_stacking.growth.blocks import BlockNames, find_block_names
from ds_stacking.growth.checks import check_finite
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.executor import MoveReport, execute
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, make_plan


def grow_folder(
    source: Path, target: Path, *, operator: str, layers: int, optimizer_state: str = "stack"
) -> tuple[Path, GrowthPlan]:
    """Grow what lies in `source` into the new folder `target`; returns what was written and the plan.

    `source` is a Hugging Face folder, or a run directory or checkpoint of ours. Raises UserError for bad input before
    anything is written, and never changes `source`.
    """
    if (source / "config.json").is_file() and not (source / "checkpoints").is_dir():
        return _grow_huggingface(source, target, operator, layers)
    if not source.is_dir():
        raise UserError(f"There is no folder {source}; give a Hugging Face folder, a run directory or a checkpoint.")
    return _grow_checkpoint(find(source).path, target, operator, layers, optimizer_state)


def _grow_huggingface(source: Path, target: Path, operator: str, layers: int) -> tuple[Path, GrowthPlan]:
    reader = HuggingFaceReader(source)
    blocks = find_block_names({name: tensor.shape for name, tensor in reader.tensors.items()})
    plan = _plan(reader.parameters, blocks, operator, layers, "stack", stage=1)
    transform = parse_operator(operator).transform
    short = [name for name, tensor in reader.tensors.items() if tensor.dtype not in ("F32", "I64", "BOOL")]
    if short and (transform.noise or transform.scale not in (0, 1)):
        raise UserError(
            f"{short[0]} is stored in 16 bits, which would round what noise and scale do; convert {source} to fp32."
        )
    check_finite(reader, OneRank(), kinds=("master",))
    with HuggingFaceWriter(target, plan, reader) as writer:
        execute(plan, reader, writer, OneRank(), kinds=("master",))
        return writer.publish(), plan


def _grow_checkpoint(
    source: Path, target: Path, operator: str, layers: int, optimizer_state: str
) -> tuple[Path, GrowthPlan]:
    reader = CheckpointReader(source)
    if (target / MANIFEST).exists() or (target.is_dir() and os.listdir(target)):
        raise UserError(f"{target} is not empty; name a new folder, nothing is overwritten.")
    extra: dict[str, Any] = dict(reader.extra)
    position = extra.get("position", {})
    stage = position.get("stage", 0) + 1
    begins = extra.get("stage_end")  # only there a stage may begin
    blocks = find_block_names({name: (info.numel,) for name, info in reader.parameters.items()})
    plan = _plan(reader.parameters, blocks, operator, layers, optimizer_state, stage=stage)
    check_finite(reader, OneRank())
    identity, generators = reader.manifest.identity, [path.read_bytes() for path in reader.generator_files()]
    with CheckpointState(
        target, reader.step, plan.parameters, extra=extra, identity=identity, generators=generators
    ) as writer:
        start = time.perf_counter()
        report = execute(plan, reader, writer, OneRank())
        if begins:
            writer.extra |= {"position": position | {"stage": stage, "stage_step": 0}, "stage_end": False}
            writer.extra |= {"evaluated": None}
            writer.extra["growths"] = [*extra["growths"], _record(plan, report, stage, time.perf_counter() - start)]
        return writer.publish(), plan


def _record(plan: GrowthPlan, report: MoveReport, stage: int, seconds: float) -> dict[str, Any]:
    """What a run's summary says of this growth; no engine was there to evaluate."""
    return {
        "from_layers": plan.from_layers,
        "to_layers": plan.to_layers,
        "operator": plan.operator,
        "optimizer_state": plan.optimizer_state,
        "stage": stage,
        "layer_map": plan.layers,
        "seconds": seconds,
        "seconds_by_phase": report.seconds,
        "bytes_moved": report.bytes_copied,
        "bytes_received": 0,
        "tensors_verified": report.tensors_verified,
        "leaked_bytes": 0,
    }


def _plan(
    parameters: dict[str, ParameterInfo],
    blocks: BlockNames,
    operator: str,
    layers: int,
    optimizer_state: str,
    *,
    stage: int,
) -> GrowthPlan:
    mapping = layer_map(operator, blocks.count, layers)
    if None in mapping:
        raise UserError(f"operator {operator!r} makes fresh blocks, which only a model can initialise; grow in a run.")
    return make_plan(
        parameters,
        blocks,
        mapping,
        operator=operator,
        optimizer_state=optimizer_state,
        stage=stage,
        transform=parse_operator(operator).transform,
    )
