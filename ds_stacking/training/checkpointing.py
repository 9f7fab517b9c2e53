"""What a run saves beside its engine's state, and how it goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_stacking.checkpoint.generators import restore_generators
from ds_stacking.checkpoint.select import Found, find_together
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.config import RunConfig, UserError
from ds_stacking.engine.factory import device
from ds_stacking.engine.stage_manager import GrowthRecord
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.evaluation.masked_lm import HeldOutLoss
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.reporting import settle
from ds_stacking.training.run_directory import METRICS

if TYPE_CHECKING:
    from ds_stacking.training.loop import Pretraining

FREE = (
    *("name", "description", "deepspeed_config", "output_dir", "overwrite", "resume", "branch_from", "data"),
    *("precision", "micro_batch_size", "tracking", "log_every"),
    *("checkpoint_every", "checkpoint_keep", "checkpoint_async"),
    *("kernels", "compile", "growth_memory", "max_skipped_steps", "hang_timeout"),
)
"""Fields that may change at a resumption: they do not decide what is learned (`data` does by its fingerprint)."""


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What a run must share with a checkpoint to go on from it."""
    decisive = {name: value for name, value in config.to_dict().items() if name not in FREE}
    decisive["corpus"] = {k: v for k, v in decisive["corpus"].items() if k != "cache_dir"}
    for stage in decisive["stages"]:
        stage.pop("micro_batch_size"), stage.pop("zero_stage")
    text = json.dumps(decisive, sort_keys=True)
    return {"recipe": sha256(text.encode()).hexdigest(), "model": decisive["model"], "data": fingerprint}


def find_checkpoint(config: RunConfig, expected: dict[str, Any], alive: Callable[[], None]) -> Found | None:
    """The checkpoint that `--resume` or else `--branch_from` asks for, the same on all ranks.

    It is read to the last byte before, which calls `alive` while it gets on. None where the run starts at step 0.
    Raises UserError where there is something to go on from but nothing valid.
    """
    exchange = make_exchange(device())
    found = None
    if config.resume == "auto":
        found = find_together(Path(config.run_dir) / "checkpoints", exchange, identity=expected, alive=alive)
    elif config.resume:
        found = find_together(Path(config.resume), exchange, identity=expected, exact=True, alive=alive)
        assert found is not None
        _check_depth(config, CheckpointReader(found.path))
    if found is None and config.branch_from:
        shared = {name: expected[name] for name in ("model", "data")}
        found = find_together(Path(config.branch_from), exchange, identity=shared, exact=True, alive=alive)
        assert found is not None
        found = replace(found, branch=True)
        reader = CheckpointReader(found.path)
        _check_depth(config, reader)
        _check_steps(config, reader)
    return found


def _check_steps(config: RunConfig, reader: CheckpointReader) -> None:
    """A branch may prolong or shorten the stage that it begins in, but not undo steps."""
    position, stages = reader.extra["position"], config.stages
    assert isinstance(stages, list)
    stage = stages[position["stage"]]
    if stage.steps < position["stage_step"]:
        raise UserError(
            f"Checkpoint {reader.path} has made {position['stage_step']} steps of stage {position['stage'] + 1}, more "
            f"than the {stage.steps} of this recipe; give an earlier checkpoint, or the stage more steps."
        )


def _check_depth(config: RunConfig, reader: CheckpointReader) -> None:
    """A checkpoint may have been grown on the disk, to any depth."""
    stage = reader.extra["position"]["stage"]
    layers = find_block_names({name: (info.numel,) for name, info in reader.parameters.items()}).count
    assert isinstance(config.stages, list)
    if stage >= len(config.stages) or config.stages[stage].layers != layers:
        depths = ", ".join(str(entry.layers) for entry in config.stages)
        raise UserError(
            f"Checkpoint {reader.path} has {layers} layers and stands in stage {stage + 1}, but the stages of "
            f"this recipe have {depths} layers; grow the checkpoint to the depth of that stage."
        )


def make_writer(config: RunConfig, expected: dict[str, Any]) -> CheckpointWriter:
    """The writer of a run."""
    return CheckpointWriter(
        Path(config.run_dir) / "checkpoints",
        make_exchange(device()),
        identity=expected,
        keep=config.checkpoint_keep,
        asynchronous=config.checkpoint_async,
    )


def save(run: Pretraining, *, stage_end: bool = False, required: bool = False) -> None:
    """Save the run between two steps; a stage's end is kept for good. All ranks call it together."""
    with run.ledger.clock("checkpoint"):
        settle(run)
        parts = [torch.zeros_like(run.loss_sum) for _ in range(run.world_size)]
        dist.all_gather(parts, run.loss_sum)
        metrics = run.run_dir / METRICS
        extra = {
            "position": asdict(run.position),
            "stage_end": stage_end,
            "ledger": run.ledger.to_dict(),
            "growths": [asdict(record) for record in run.growths],
            "evaluated": run.evaluated and [*run.evaluated[0], asdict(run.evaluated[1])],
            "stage_steps": [stage.steps for stage in run.stages],
            "logged_losses": run.logged_losses,
            "loss_sum": [float(part) for part in parts],
            "steps_in_loss": run.steps_in_loss,
            "health": run.health.to_dict(),
            "metrics_bytes": metrics.stat().st_size if run.rank == 0 else 0,
        }
        run.writer.save(
            run.position.step,
            LiveState(run.engine),
            run.manager.current_parameters(),
            extra=extra,
            keep=stage_end,
            required=required,
        )
    tell_reports(run)


def tell_reports(run: Pretraining) -> None:
    """Say which saves failed; one that succeeded is silent."""
    for report in run.writer.reports():
        if report.error or report.warning:
            run.console.line(report.line)


def restore(run: Pretraining, found: Found) -> bool:
    """Bring `run` to the checkpoint; returns whether it stands at the end of a stage, the next one not begun."""
    reader = CheckpointReader(found.path)
    extra = reader.extra
    run.position = type(run.position)(**extra["position"])
    run.manager.restore(run.spec(run.position.stage), reader.parameters, reader, stage=run.position.stage)
    run.ledger = Ledger.from_dict(extra["ledger"], peak=run.ledger.peak)
    if len(run.ledger.stages) == run.position.stage:  # the checkpoint was grown on the disk
        run.ledger.start_stage(run.stages[run.position.stage].layers)
    run.growths = [GrowthRecord(**record) for record in extra["growths"]]
    if extra["evaluated"] and not found.branch:  # a branch may evaluate on other blocks
        step, layers, loss = extra["evaluated"]
        run.evaluated = ((step, layers), HeldOutLoss(**loss))
    same_ranks = len(extra["loss_sum"]) == run.world_size
    mine = extra["loss_sum"][run.rank] if same_ranks else sum(extra["loss_sum"]) * (run.rank == 0)
    run.loss_sum.fill_(mine)
    run.steps_in_loss = extra["steps_in_loss"]
    run.health.load(extra["health"])
    run.settled = run.position.step
    settled = extra["stage_steps"][: run.position.stage] if found.branch else extra["stage_steps"]
    for stage, steps in zip(run.stages, settled, strict=not found.branch):
        stage.steps = steps
    run.logged_losses = [(flops, loss) for flops, loss in extra["logged_losses"]]
    generators = reader.generators(run.rank, run.world_size)
    if generators is None:
        run.seed_dropout()
    else:
        restore_generators(generators)
    return extra["stage_end"] and run.position.stage_step == run.stages[run.position.stage].steps


def cut_metrics(run_dir: Path, found: Found) -> None:
    """Rank 0: cut metrics.jsonl back to where the checkpoint saw it, so that no step stands twice."""
    path = run_dir / METRICS
    size = CheckpointReader(found.path).extra["metrics_bytes"]
    if found.path.parent.parent.resolve() == run_dir.resolve() and path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
