"""Which checkpoints go: all but the newest N valid ones and those that are marked to be kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds_stacking.checkpoint.durable import remove_checkpoint
from ds_stacking.checkpoint.manifest import Unusable
from ds_stacking.checkpoint.select import published


def prune(folder: Path, *, keep: int, is_valid: Callable[[Path], bool]) -> None:
    """Delete what is older than the newest `keep` valid checkpoints of `folder`. Raises OSError.

    A directory without a readable manifest is never deleted: it may be evidence, or somebody else's.
    """
    counted: set[int] = set()
    for path, manifest in published(folder):
        if isinstance(manifest, Unusable):
            continue
        if len(counted) < keep and manifest.step not in counted:
            if is_valid(path):
                counted.add(manifest.step)
        elif not manifest.keep:
            remove_checkpoint(path)
