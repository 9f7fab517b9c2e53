"""The run directory: claimed before anything is computed, its JSON files written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.config import RunConfig

CONFIG, SUMMARY, METRICS, STOP = "config.json", "summary.json", "metrics.jsonl", "stop"
SAVED = "saved.json"
"""Names the newest checkpoint, outside the folder of checkpoints, which may lie on storage that is not there."""
OURS = (CONFIG, SUMMARY, METRICS, STOP, SAVED, "wandb_id.txt", "checkpoints", "export", "report", "wandb")
"""What a run writes; --overwrite deletes this and nothing else."""


def stop_names() -> tuple[str, ...]:
    """The files that ask this run to stop: a person's, and that of its own SLURM job alone, for the batch script."""
    job = os.environ.get("SLURM_JOB_ID")
    return (STOP, f"{STOP}-{job}") if job else (STOP,)


def check_run_directory(config: RunConfig) -> None:
    """Raise UserError where the run directory holds another run or cannot be one. Writes nothing."""
    path = Path(config.run_dir)
    if config.resume and config.overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it; give one of them.")
    if config.overwrite and config.branch_from and _lies_in(config.branch_from, path):
        raise UserError(
            f"--overwrite would delete {config.branch_from}, which --branch_from begins with; "
            f"choose another --output_dir."
        )
    goes_on = config.resume and (config.resume == "auto" or _lies_in(config.resume, path))
    if not (config.overwrite or goes_on) and any(os.path.lexists(path / name) for name in OURS):
        raise UserError(
            f"output_dir {path} holds another run; give --resume auto, --overwrite, or another --output_dir."
        )
    # The functions of os.path, unlike Path.exists, answer False where a parent may not be searched.
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not os.path.isdir(existing):
        raise UserError(f"output_dir {path} cannot be made: {existing} is no folder; choose another --output_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir {path} cannot be made: no permission to write in {existing}; choose another --output_dir."
        )


def _lies_in(inner: str, folder: Path) -> bool:
    """Whether `inner` is `folder` or in it, by its name or through links (the folder of checkpoints may be one)."""
    by_name = Path(os.path.abspath(inner)).is_relative_to(os.path.abspath(folder))
    return by_name or Path(inner).resolve().is_relative_to(folder.resolve())


def refuse_lost_checkpoints(run_dir: Path) -> None:
    """Raise UserError where a run that has saved checkpoints has none; a start afresh would delete the rest of it."""
    folder = run_dir / "checkpoints"
    try:
        newest = json.loads((run_dir / SAVED).read_bytes())["newest"]
    except (OSError, ValueError, KeyError, TypeError):
        newest = None
    if newest is None and (folder.is_dir() or not os.path.lexists(folder)):
        return
    what = f"{folder} has none"
    if not folder.is_dir():
        what = f"{folder} is no folder" if os.path.lexists(folder) else f"{folder} is gone"
        if folder.is_symlink():
            what = f"{folder} leads to {os.readlink(folder)}, which is not there"
    raise UserError(
        f"The run in {run_dir} {f'saved {newest}' if newest else 'was to save checkpoints'}, but {what}; "
        f"mount or restore that folder, or start again with --overwrite in the place of --resume."
    )


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds a run that reached its end."""
    try:
        return json.loads((Path(config.run_dir) / SUMMARY).read_bytes())["finished"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def claim_run_directory(config: RunConfig, resolved: Mapping[str, Any], *, keep: bool = False) -> Path:
    """Make the run directory, readable by its owner only, and write the resolved configuration into it.

    What an earlier run left is deleted, or where this one goes on with it (`keep`) only the request to stop.
    """
    path = Path(config.run_dir)
    for name in stop_names() if keep else {*OURS, *stop_names()}:
        old = path / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    make_private(path)
    write_json(path / CONFIG, resolved)
    return path


def make_private(path: Path) -> None:
    """Make a folder and its parents; what this process writes from here on is its user's alone."""
    os.umask(0o077)
    path.mkdir(parents=True, exist_ok=True)
