"""Which checkpoint a run goes on from: the newest valid one, chosen by rank 0 for all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_stacking.checkpoint.format import CHECKPOINT_NAME, MANIFEST
from ds_stacking.checkpoint.manifest import Manifest, Unusable, read_manifest
from ds_stacking.checkpoint.share import from_first_rank
from ds_stacking.checkpoint.verify import verify
from ds_stacking.config import UserError
from ds_stacking.growth.exchange import Exchange


@dataclass(frozen=True, kw_only=True)
class Found:
    """The checkpoint to load."""

    path: Path
    step: int
    """Optimizer steps made."""
    notes: tuple[str, ...] = field(default=())
    """One line for everything newer or strange that was passed over."""
    branch: bool = False
    """Whether it is another run's, and a new run begins with its state."""


def published(folder: Path) -> list[tuple[Path, Manifest | Unusable]]:
    """Every checkpoint of `folder`, newest first, with its manifest or why there is none; no other file is opened.

    What cannot be dated comes first: it may have been the newest.
    """
    found: list[tuple[Path, Manifest | Unusable]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if CHECKPOINT_NAME.fullmatch(path.name):
            try:
                found.append((path, read_manifest(path)))
            except Unusable as reason:
                found.append((path, reason))
    return sorted(found, key=_age, reverse=True)


def newest_valid(folder: Path, identity: Mapping[str, Any] | None = None) -> Found | None:
    """The newest checkpoint of `folder` that is whole and of a run with this `identity`; None in an empty folder.

    Raises UserError where something is there but nothing valid: a run never starts afresh by mistake.
    """
    notes = [
        f"{path} is passed over: it is no checkpoint." for path in _visible(folder) if not _is_checkpoint_name(path)
    ]
    for path, _ in published(folder):
        try:
            manifest = verify(path, identity)
        except Unusable as reason:
            notes.append(f"Checkpoint {path} is skipped: {reason}.")
            continue
        return Found(path=path, step=manifest.step, notes=tuple(notes))
    if not notes:
        return None
    raise UserError(
        f"{folder} holds no valid checkpoint, so the run cannot be resumed; restore one, or start again in another "
        f"folder. {' '.join(notes)}"
    )


def find(path: Path, identity: Mapping[str, Any] | None = None) -> Found:
    """The checkpoint that a user means by `path`: itself, or the newest valid one of a run directory or its folder.

    Raises UserError where `path` names one checkpoint and that one is unusable, or where nothing is there.
    """
    if not path.is_dir():
        raise UserError(f"There is no folder {path} to resume from; give a run directory or a checkpoint.")
    if (path / MANIFEST).exists() or _is_checkpoint_name(path):
        try:
            return Found(path=path, step=verify(path, identity).step)
        except Unusable as reason:
            raise UserError(f"Checkpoint {path} cannot be loaded: {reason}; choose another one.") from None
    inner = path / "checkpoints"
    found = newest_valid(inner if inner.is_dir() else path, identity)
    if found is None:
        raise UserError(f"There is no checkpoint in {path} to resume from; give another folder, or start a new run.")
    return found


def find_together(
    path: Path, exchange: Exchange, *, identity: Mapping[str, Any] | None = None, exact: bool = False
) -> Found | None:
    """`newest_valid(path)`, or with `exact` `find(path)`, decided by rank 0. All ranks call it together.

    Raises UserError on every rank, also where some rank cannot see the chosen folder.
    """

    def decide() -> dict[str, Any] | None:
        try:
            found = find(path, identity) if exact else newest_valid(path, identity)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend its permissions.") from None
        if found is None:
            return None
        return {"path": str(found.path.absolute()), "step": found.step, "notes": found.notes}

    answer = from_first_rank(decide, exchange)
    if answer is None:
        return None
    found = Found(path=Path(answer["path"]), step=answer["step"], notes=tuple(answer["notes"]))
    blind = exchange.total(int(not (found.path / MANIFEST).is_file()))
    if blind:
        raise UserError(
            f"{blind} ranks do not see {found.path}; put the run directory on storage that all nodes share."
        )
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _is_checkpoint_name(path: Path) -> bool:
    return CHECKPOINT_NAME.fullmatch(path.name) is not None


def _age(item: tuple[Path, Manifest | Unusable]) -> tuple[float, int, int]:
    path, manifest = item
    name = CHECKPOINT_NAME.fullmatch(path.name)
    assert name is not None
    sequence = manifest.sequence if isinstance(manifest, Manifest) else float("inf")
    return sequence, int(name[1]), int(name[2] or 1)
