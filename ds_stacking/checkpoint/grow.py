"""Growth on the disk: a Hugging Face folder or a checkpoint of ours, by the plan and executor of a live growth."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ds_stacking.checkpoint.format import STATE
from ds_stacking.checkpoint.huggingface import HuggingFaceReader, HuggingFaceWriter, other_files
from ds_stacking.checkpoint.manifest import Number
from ds_stacking.checkpoint.offline import CheckpointState
from ds_stacking.checkpoint.select import find
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError, require
from ds_stacking.common.files import explain_disk, whole_folder
from ds_stacking.common.json_files import KEEP_OTHERS, parse_json
from ds_stacking.common.model_folder import CONFIG, MOST_BLOCKS
from ds_stacking.common.words import shown
from ds_stacking.growth.blocks import BlockNames, find_block_names
from ds_stacking.growth.checks import check_finite
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.executor import MoveReport, execute
from ds_stacking.growth.operators import OPERATORS, layer_map, parse_operator
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, plan_growth

LONGEST_OPERATOR = 10_000
"""Characters, enough to list every block of the deepest model twice."""

LONGEST_NAME = 200
"""Bytes of a new folder's name; while it is filled it has a longer one."""


class _Position(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    stage: Number


class _Extra(TypedDict):
    """What a growth changes of what a run has saved."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    position: NotRequired[_Position]
    stage_end: NotRequired[bool]
    growths: NotRequired[list[dict[str, Any]]]


def grow_folder(
    source: Path, target: Path, *, operator: str, layers: int, optimizer_state: str = "stack"
) -> tuple[Path, GrowthPlan]:
    """Grow what lies in `source` into the new folder `target`; returns what was written and the plan.

    `source` is a Hugging Face folder, or a run directory or checkpoint of ours. Raises UserError for bad input before
    anything is written, RunFailed where the disk does not take the new folder, and never changes `source`.
    """
    _check_options(operator, layers)
    if not source.is_dir():
        what = "is a file" if source.exists() else "is not there"
        raise UserError(f"There is no folder {source}, it {what}; give a Hugging Face folder, a run or a checkpoint.")
    _check_target(source, target)
    is_run = (source / "checkpoints").is_dir() or (source / "metrics.jsonl").is_file()
    if os.path.lexists(source / CONFIG) and not is_run:
        return _grow_huggingface(source, target, operator, layers)
    return _grow_checkpoint(find(source, fits=_read_extra).path, target, operator, layers, optimizer_state)


def _check_options(operator: str, layers: int) -> None:
    require(
        1 <= layers <= MOST_BLOCKS,
        f"The number of layers is {layers if abs(layers) < 10**20 else 'huge'}; it must be 1 to {MOST_BLOCKS}.",
    )
    require(operator.strip(), f"The operator is empty; give {', '.join(OPERATORS)} or a list: 0,1,2,2,1,0.")
    if len(operator) > LONGEST_OPERATOR or re.search(r"[0-9]{10}", operator):
        raise UserError(f"The operator is {shown(operator)}; it must name blocks of the model.")


def _check_target(source: Path, target: Path) -> None:
    """Raise UserError where no new folder can be made at `target`, or only inside `source`."""
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists; name a folder that does not, nothing is overwritten.")
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise UserError(f"{target} cannot be made: its name is longer than {LONGEST_NAME} bytes; name another.")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} lies inside {source}, which stays as it is; name a folder elsewhere.")
    existing = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not os.path.isdir(existing):
        raise UserError(f"{target} cannot be made: {existing} is no folder; name another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{target} cannot be made: no permission to write in {existing}; name another.")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target`; where the body fails, it is gone, and so are the parents made for it."""
    above = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} cannot be made ({error.strerror}); name another folder.") from None
        try:
            with whole_folder(target) as unfinished:
                yield unfinished
        except OSError as error:
            raise explain_disk("The grown model", target, error) from error
    except BaseException:
        for folder in above:
            with suppress(OSError):
                folder.rmdir()
        raise


def _grow_huggingface(source: Path, target: Path, operator: str, layers: int) -> tuple[Path, GrowthPlan]:
    reader = HuggingFaceReader(source)
    try:
        blocks = find_block_names({name: tensor.shape for name, tensor in reader.tensors.items()})
    except UserError as error:
        raise UserError(f"{source} cannot be grown: {error}") from None
    plan = _plan(source, reader.parameters, blocks, operator, layers, "stack", stage=1)
    transform = parse_operator(operator).transform
    short = [name for name, tensor in reader.tensors.items() if tensor.dtype not in ("F32", "I64", "BOOL")]
    if short and (transform.noise or transform.scale not in (0, 1)):
        raise UserError(
            f"{short[0]} is stored in 16 bits, which would round what noise and scale do; convert {source} to fp32."
        )
    other_files(source)
    check_finite(reader, OneRank(), kinds=("master",))
    with _new_folder(target) as unfinished:
        writer = HuggingFaceWriter(unfinished, plan, reader)
        execute(plan, reader, writer, OneRank(), kinds=("master",))
        writer.finish()
    return target, plan


def _grow_checkpoint(
    source: Path, target: Path, operator: str, layers: int, optimizer_state: str
) -> tuple[Path, GrowthPlan]:
    reader = CheckpointReader(source)
    extra: dict[str, Any] = dict(reader.extra)
    position = extra.get("position", {})
    stage = position.get("stage", 0) + 1
    begins = extra.get("stage_end")  # only there a stage may begin
    blocks = find_block_names({name: (info.numel,) for name, info in reader.parameters.items()})
    plan = _plan(source, reader.parameters, blocks, operator, layers, optimizer_state, stage=stage)
    check_finite(reader, OneRank())
    identity, generators = reader.manifest.identity, [path.read_bytes() for path in reader.generator_files()]
    with _new_folder(target) as unfinished:
        unfinished.chmod(0o700)
        with CheckpointState(
            unfinished, reader.step, plan.parameters, extra=extra, identity=identity, generators=generators
        ) as writer:
            start = time.perf_counter()
            report = execute(plan, reader, writer, OneRank())
            if begins:
                writer.extra |= {"position": position | {"stage": stage, "stage_step": 0}, "stage_end": False}
                writer.extra |= {"evaluated": None}
                growth = _record(plan, report, stage, time.perf_counter() - start)
                writer.extra["growths"] = [*extra.get("growths", []), growth]
            written = writer.publish()
    return target / written.name, plan


def _read_extra(reader: CheckpointReader) -> None:
    """Raise UserError where a checkpoint holds something else in the fields that a growth changes."""
    text = json.dumps(reader.extra)
    parse_json(text, _Extra, where=f"{reader.path / STATE}, in extra,", mend="restore it")


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
    source: Path,
    parameters: dict[str, ParameterInfo],
    blocks: BlockNames,
    operator: str,
    layers: int,
    optimizer_state: str,
    *,
    stage: int,
) -> GrowthPlan:
    if None in layer_map(operator, blocks.count, layers):
        raise UserError(f"operator {operator!r} makes fresh blocks, which only a model can initialise; grow in a run.")
    try:
        return plan_growth(parameters, blocks, layers, operator, optimizer_state, stage)
    except KeyError as error:  # such as blocks.00.weight
        raise UserError(
            f"{source} cannot be grown: its blocks have no plain numbers, for there is no {shown(error.args[0])}."
        ) from None
