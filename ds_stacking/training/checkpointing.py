"""What a run saves beside its engine's state, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
from ds_stacking.training.batching import engine_spec
from ds_stacking.training.changes import (
    OTHER_RUN,
    Settings,
    find_changes,
    refuse_another_run,
    saved_settings,
    settings,
)
from ds_stacking.training.metrics import Metrics
from ds_stacking.training.run_directory import CHECKPOINTS, METRICS, refuse_lost_checkpoints
from ds_stacking.training.saved_state import check_fits, saved_state
from ds_stacking.training.state import TrainState, from_all_ranks, seed_dropout


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
    extra = saved_state(reader)
    position = extra["position"]
    changes = find_changes(_then(found.path, reader.manifest, config), settings(config))
    refuse_another_run(found.path, changes, position["stage"])
    if f"stages[{position['stage']}].steps" in changes:
        _check_steps(config, reader)
    new = [{"step": found.step, "field": name, "from": a, "to": b} for name, (a, b) in changes.items()]
    return [*extra["changes"], *new]


def _check_steps(config: RunConfig, reader: CheckpointReader) -> None:
    """Who goes on may prolong or shorten the stage that the checkpoint stands in, but not undo steps."""
    position, stages = saved_state(reader)["position"], config.stages
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
    if stage >= len(config.stages) or config.stages[stage].layers != layers:
        depths = ", ".join(str(entry.layers) for entry in config.stages)
        raise UserError(
            f"Checkpoint {reader.path} has {layers} layers and stands in stage {stage + 1}, but the stages of "
            f"this recipe have {depths} layers; grow the checkpoint to the depth of that stage."
        )


def save(
    metrics: Metrics, writer: CheckpointWriter, run_dir: Path, *, stage_end: bool = False, required: bool = False
) -> None:
    """Save the run between two steps; a stage's end is kept for good. All ranks call it together."""
    state, manager = metrics.state, metrics.manager
    with metrics.ledger.clock("checkpoint"):
        metrics.charge_flops()
        loss_sums = from_all_ranks(state.loss_sum)
        metrics.tracker.flush()
        extra = state.state_dict() | {
            "loss_sum": loss_sums,
            "stage_end": stage_end,
            "ledger": metrics.ledger.state_dict(),
            "metrics_bytes": (run_dir / METRICS).stat().st_size if dist.get_rank() == 0 else 0,
        }
        writer.save(
            state.position.step,
            LiveState(manager.engine),
            manager.current_parameters(),
            extra=extra,
            keep=stage_end,
            required=required,
        )
    log_failed_saves(writer, metrics.log)


def log_failed_saves(writer: CheckpointWriter, log: Callable[[str], None]) -> None:
    """Say which saves failed; one that succeeded is silent."""
    for report in writer.reports():
        if report.error or report.warning:
            log(report.line)


def restore(config: RunConfig, metrics: Metrics, found: Found) -> bool:
    """Go on from the checkpoint; returns whether it stands at the end of a stage, the next one not begun."""
    reader, state, ledger = CheckpointReader(found.path), metrics.state, metrics.ledger
    saved = saved_state(reader)
    position = saved["position"]
    stage, plan = config.stages[position["stage"]], metrics.plans[position["stage"]]
    if not position.get("by_length"):  # of an older version, which counted all lengths as one
        position["by_length"] = {str(plan.sequence_length): position["samples"]}
    metrics.manager.restore(engine_spec(stage, plan), reader.parameters, reader, stage=position["stage"])
    _refuse_diverged(LiveState(metrics.manager.engine), found)
    ledger.load_state_dict(saved["ledger"])
    if len(ledger.stages) == position["stage"]:  # the checkpoint was grown on the disk
        ledger.start_stage(stage.layers)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sums = saved["loss_sum"]
    saved["loss_sum"] = sums[rank] if len(sums) == world_size else sum(sums) * (rank == 0)
    saved["stage_steps"] = _settle_stages(state, saved, found)
    saved["changes"] = state.changes  # with those of this resumption
    if found.branch:  # which may evaluate on other sequences
        saved["evaluated"] = None
    state.load_state_dict(saved)
    generators = reader.generators(rank, world_size)
    if generators is None:
        seed_dropout(config.seed, state.position.step)
    else:
        restore_generators(generators)
    return saved["stage_end"] and not state.steps_left


def _refuse_diverged(state: LiveState, found: Found) -> None:
    """Raise UserError, on every rank, where the state that was restored is not finite."""
    try:
        check_finite(state, make_exchange(device()))
    except UserError:
        raise UserError(
            f"Checkpoint {found.path} holds NaN or infinite numbers: the run had diverged; give an earlier one as "
            f"--resume DIR, and a lower --lr."
        ) from None


def _settle_stages(state: TrainState, saved: Mapping[str, Any], found: Found) -> list[int]:
    """Steps of every stage: as saved, but of those to come what the recipe says where this resumption changed it."""
    given = {change["field"] for change in state.changes if change["step"] == found.step}
    steps = list(state.stage_steps)
    for number, settled in enumerate(saved["stage_steps"][: len(steps)]):
        is_over = number < saved["position"]["stage"]
        if is_over or not (found.branch or f"stages[{number}].steps" in given):
            steps[number] = settled
    return steps


def metrics_bytes(run_dir: Path, found: Found | None) -> int | None:
    """Bytes of metrics.jsonl that the checkpoint saw; None where it is not this run directory's."""
    if found is None or found.path.parent.parent.resolve() != run_dir.resolve():
        return None
    return saved_state(CheckpointReader(found.path))["metrics_bytes"]
