"""What a run saves beside its engine's state, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_stacking.checkpoint.format import MANIFEST
from ds_stacking.checkpoint.manifest import Manifest, Unusable, read_manifest
from ds_stacking.checkpoint.select import Found, find_together, published
from ds_stacking.checkpoint.share import from_first_rank
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import UserError
from ds_stacking.common.generators import restore_generators
from ds_stacking.config import RunConfig
from ds_stacking.engine.factory import device
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.checks import check_finite
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.training.changes import (
    OTHER_RUN,
    Settings,
    find_changes,
    refuse_another_run,
    saved_settings,
    settings,
)
from ds_stacking.training.compatibility import check_fits
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.reporting import charge_flops
from ds_stacking.training.run_directory import CHECKPOINTS, METRICS, SAVED, refuse_lost_checkpoints
from ds_stacking.training.saved_state import ledger_values, saved_state

if TYPE_CHECKING:
    from ds_stacking.training.loop import Pretraining


def identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of its run: the model and the data, which never change, and every other setting."""
    return {"model": config.to_dict()["model"], "data": fingerprint, "settings": settings(config)}


def find_checkpoint(config: RunConfig, expected: dict[str, Any], alive: Callable[[], None]) -> Found | None:
    """The checkpoint that `--resume` or else `--branch_from` asks for, the same on all ranks.

    It is read to the last byte before, which calls `alive` while it gets on. None where the run starts at step 0.
    Raises UserError where there is something to go on from but nothing valid.
    """
    exchange = make_exchange(device())
    shared = {name: expected[name] for name in ("model", "data")}
    fits = partial(check_fits, config=config)
    found = None
    if config.resume:
        path = Path(config.run_dir) / CHECKPOINTS if config.resume == "auto" else Path(config.resume)
        from_first_rank(lambda: _refuse_early(path, config), exchange)
        exact = config.resume != "auto"
        found = find_together(path, exchange, identity=shared, fits=fits, exact=exact, alive=alive)
        if found is None:
            from_first_rank(lambda: refuse_lost_checkpoints(Path(config.run_dir)), exchange)
    if found is not None:
        _check_depth(config, CheckpointReader(found.path))
    if found is None and config.branch_from:
        path = Path(config.branch_from)
        found = find_together(path, exchange, identity=shared, fits=fits, exact=True, alive=alive)
        assert found is not None
        found = replace(found, branch=True)
        reader = CheckpointReader(found.path)
        _check_depth(config, reader)
        _check_steps(config, reader)
    return found


def _refuse_early(path: Path, config: RunConfig) -> None:
    """Rank 0: refuse what would be another run before any large file is read."""
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    try:
        manifests = [(path, read_manifest(path))] if (path / MANIFEST).is_file() else published(folder)
    except (OSError, Unusable):
        return  # it will be said why
    for newest, manifest in manifests:
        if isinstance(manifest, Manifest):
            refuse_another_run(newest, find_changes(_then(newest, manifest, config), settings(config)))
            return


def _then(path: Path, manifest: Manifest, config: RunConfig) -> Settings:
    """The settings that a checkpoint was saved under."""
    then = saved_settings(manifest.identity, path.absolute().parents[1], config)
    if then is None:
        raise UserError(
            f"{path} was saved by an older version under settings that nothing here tells; go on with that version, "
            f"or leave it alone: {OTHER_RUN}."
        )
    return then


def changed_settings(config: RunConfig, found: Found | None) -> list[dict[str, Any]]:
    """Every change of settings in the run's life, the ones of this resumption last; told by rank 0. Raises UserError.

    Entries are {"step", "field", "from", "to"}.
    """
    if found is None or found.branch:
        return []
    reader = CheckpointReader(found.path)
    extra, stages = saved_state(reader), config.stages
    position = extra["position"]
    assert isinstance(stages, list)
    changes = find_changes(_then(found.path, reader.manifest, config), settings(config))
    refuse_another_run(found.path, changes, position["stage"])
    if f"stages[{position['stage']}].steps" in changes:
        _check_steps(config, reader)
    new = [{"step": found.step, "field": name, "from": a, "to": b} for name, (a, b) in changes.items()]
    return [*(dict(change) for change in extra.get("changes", [])), *new]


def _check_steps(config: RunConfig, reader: CheckpointReader) -> None:
    """Who goes on may prolong or shorten the stage that the checkpoint stands in, but not undo steps."""
    position, stages = saved_state(reader)["position"], config.stages
    assert isinstance(stages, list)
    stage = stages[position["stage"]]
    if stage.steps < position["stage_step"]:
        raise UserError(
            f"Checkpoint {reader.path} has made {position['stage_step']} steps of stage {position['stage'] + 1}, more "
            f"than the {stage.steps} of this recipe; give an earlier checkpoint, or the stage more steps."
        )


def _check_depth(config: RunConfig, reader: CheckpointReader) -> None:
    """A checkpoint may have been grown on the disk, to any depth."""
    stage = saved_state(reader)["position"]["stage"]
    layers = find_block_names({name: (info.numel,) for name, info in reader.parameters.items()}).count
    assert isinstance(config.stages, list)
    if stage >= len(config.stages) or config.stages[stage].layers != layers:
        depths = ", ".join(str(entry.layers) for entry in config.stages)
        raise UserError(
            f"Checkpoint {reader.path} has {layers} layers and stands in stage {stage + 1}, but the stages of "
            f"this recipe have {depths} layers; grow the checkpoint to the depth of that stage."
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


def save(run: Pretraining, *, stage_end: bool = False, required: bool = False) -> None:
    """Save the run between two steps; a stage's end is kept for good. All ranks call it together."""
    with run.ledger.clock("checkpoint"):
        charge_flops(run)
        parts = [torch.zeros_like(run.loss_sum) for _ in range(run.world_size)]
        dist.all_gather(parts, run.loss_sum)
        metrics = run.run_dir / METRICS
        run.tracker.flush()
        extra = {
            "position": asdict(run.position),
            "stage_end": stage_end,
            "ledger": run.ledger.to_dict(),
            "growths": [asdict(record) for record in run.growths],
            "evaluated": run.evaluated and [*run.evaluated[0], asdict(run.evaluated[1])],
            "stage_steps": [stage.steps for stage in run.stages],
            "held_out_losses": run.held_out_losses,
            "loss_sum": [float(part) for part in parts],
            "steps_in_loss": run.steps_in_loss,
            "health": run.health.to_dict(),
            "changes": run.changes,
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
    log_failed_saves(run)


def log_failed_saves(run: Pretraining) -> None:
    """Say which saves failed; one that succeeded is silent."""
    for report in run.writer.reports():
        if report.error or report.warning:
            run.console.line(report.line)


def restore(run: Pretraining, found: Found) -> bool:
    """Bring `run` to the checkpoint; returns whether it stands at the end of a stage, the next one not begun."""
    reader = CheckpointReader(found.path)
    saved = saved_state(reader)
    run.position = type(run.position)(**saved["position"])
    if not run.position.by_length:  # of an older version, which counted all lengths as one
        run.position.by_length = {str(run.plans[run.position.stage].sequence_length): run.position.samples}
    run.manager.restore(run.spec(run.position.stage), reader.parameters, reader, stage=run.position.stage)
    _refuse_diverged(run, found)
    run.ledger = Ledger.from_dict(ledger_values(saved["ledger"]), peak=run.ledger.peak)
    if len(run.ledger.stages) == run.position.stage:  # the checkpoint was grown on the disk
        run.ledger.start_stage(run.stages[run.position.stage].layers)
    run.growths = saved["growths"]
    if saved["evaluated"] and not found.branch:  # a branch may evaluate on other blocks
        step, layers, loss = saved["evaluated"]
        run.evaluated = ((step, layers), loss)
    same_ranks = len(saved["loss_sum"]) == run.world_size
    mine = saved["loss_sum"][run.rank] if same_ranks else sum(saved["loss_sum"]) * (run.rank == 0)
    run.loss_sum.fill_(mine)
    run.steps_in_loss = saved["steps_in_loss"]
    run.health.load(dict(saved["health"]))
    run.settled = run.position.step
    _settle_stages(run, saved["stage_steps"], found)
    run.held_out_losses = list(saved.get("held_out_losses", []))
    generators = reader.generators(run.rank, run.world_size)
    if generators is None:
        run.seed_dropout()
    else:
        restore_generators(generators)
    return saved["stage_end"] and run.position.stage_step == run.stages[run.position.stage].steps


def _refuse_diverged(run: Pretraining, found: Found) -> None:
    """Raise UserError, on every rank, where the state that was restored is not finite."""
    try:
        check_finite(LiveState(run.engine), make_exchange(run.device))
    except UserError:
        raise UserError(
            f"Checkpoint {found.path} holds NaN or infinite numbers: the run had diverged; give an earlier one as "
            f"--resume DIR, and a lower --lr."
        ) from None


def _settle_stages(run: Pretraining, steps: list[int], found: Found) -> None:
    """Give the stages the steps that a trigger settled, but those to come that this resumption was given others."""
    given = {change["field"] for change in run.changes if change["step"] == found.step}
    for number, (stage, settled) in enumerate(zip(run.stages, steps, strict=False)):
        is_over = number < run.position.stage
        if is_over or not (found.branch or f"stages[{number}].steps" in given):
            stage.steps = settled


def metrics_bytes(run_dir: Path, found: Found | None) -> int | None:
    """Bytes of metrics.jsonl that the checkpoint saw; None where it is not this run directory's."""
    if found is None or found.path.parent.parent.resolve() != run_dir.resolve():
        return None
    return saved_state(CheckpointReader(found.path))["metrics_bytes"]
