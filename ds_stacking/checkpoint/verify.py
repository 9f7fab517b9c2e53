"""Whether a checkpoint is exactly what was written: sizes first, which is cheap, then every byte."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_stacking.checkpoint.durable import file_sha256
from ds_stacking.checkpoint.format import CHECKPOINT_NAME, MANIFEST
from ds_stacking.checkpoint.manifest import Manifest, Unusable, read_manifest


def verify(path: Path, identity: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of the checkpoint at `path`, after every file was compared with it.

    With `identity`, each of its values must be the checkpoint's too. No file is opened that the manifest does not
    list, and none is interpreted before its checksum is right. Raises Unusable with the reason.
    """
    if path.is_symlink() or not path.is_dir():
        raise Unusable("it is no directory")
    manifest = read_manifest(path)
    _check_name(path, manifest)
    _check_identity(manifest, identity or {})
    _check_sizes(path, manifest)
    _check_content(path, manifest)
    return manifest


def _check_name(path: Path, manifest: Manifest) -> None:
    name = CHECKPOINT_NAME.fullmatch(path.name)
    if name and int(name[1]) != manifest.step:
        raise Unusable(f"its {MANIFEST} is of step {manifest.step}")


def _check_identity(manifest: Manifest, identity: Mapping[str, Any]) -> None:
    there = _flat(manifest.identity)
    for key, here in _flat(json.loads(json.dumps(identity))).items():
        if there.get(key) != here:
            raise Unusable(f"it is of another run: {key} is {there.get(key)!r} there and {here!r} here")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"layers": 6}} -> {"model.layers": 6}: a message names the one value that differs."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_sizes(path: Path, manifest: Manifest) -> None:
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None
    foreign = sorted(set(found) - set(manifest.files) - {MANIFEST})
    if foreign:
        raise Unusable(f"{foreign[0]} does not belong to it; remove that file if you trust the rest")
    for name, record in manifest.files.items():
        if name not in found:
            raise Unusable(f"{name} is missing")
        if not stat.S_ISREG(found[name].st_mode):
            raise Unusable(f"{name} is no ordinary file")
        if found[name].st_size != record.size:
            raise Unusable(f"{name} has {found[name].st_size} bytes instead of {record.size}")


def _check_content(path: Path, manifest: Manifest) -> None:
    workers = min(8, len(os.sched_getaffinity(0)))
    try:
        with ThreadPoolExecutor(workers) as pool:
            sums = list(pool.map(lambda name: file_sha256(path / name), manifest.files))
    except OSError as error:
        raise Unusable(f"{Path(error.filename).name} cannot be read ({error.strerror})") from None
    for (name, record), found in zip(manifest.files.items(), sums, strict=True):
        if found != record.sha256:
            raise Unusable(f"{name} was changed after it was written (its sha256 differs)")
