"""Whether a checkpoint is exactly what was written: sizes first, which is cheap, then every byte."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from ds_stacking.checkpoint.durable import file_sha256
from ds_stacking.checkpoint.format import CHECKPOINT_NAME, MANIFEST
from ds_stacking.checkpoint.manifest import Manifest, Unusable, read_manifest

CHANGED = -1
"""The fault of a file that is not what was written."""


def verify(path: Path, identity: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of the checkpoint at `path`, after every file was compared with it.

    With `identity`, each of its values must be the checkpoint's too. No file is opened that the manifest does not
    list, and none is interpreted before its checksum is right. Raises Unusable with the reason.
    """
    manifest = verify_cheaply(path, identity)
    if reason := content_fault(path, manifest):
        raise Unusable(reason)
    return manifest


def verify_cheaply(path: Path, identity: Mapping[str, Any] | None = None) -> Manifest:
    """The same with the cheap checks only: manifest, name, identity, the sizes of all files."""
    if path.is_symlink() or not path.is_dir():
        raise Unusable("it is no directory")
    manifest = read_manifest(path)
    _check_name(path, manifest)
    _check_identity(manifest, identity or {})
    _check_sizes(path, manifest)
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


def content_fault(path: Path, manifest: Manifest) -> str | None:
    """What is wrong with the content of a checkpoint's files, read by this rank alone; None where nothing is."""
    names = list(manifest.files)
    return describe_faults(names, find_faults(path, manifest, names))


def find_faults(
    path: Path, manifest: Manifest, names: Sequence[str], count: Callable[[int], None] = lambda size: None
) -> list[int]:
    """By file: 0 where its content is what the manifest says, CHANGED, or the error number of reading it.

    `count` is told the bytes read, in several threads.
    """

    def fault(name: str) -> int:
        try:
            return 0 if file_sha256(path / name, count) == manifest.files[name].sha256 else CHANGED
        except OSError as error:
            return error.errno or errno.EIO

    with ThreadPool(min(8, len(os.sched_getaffinity(0)))) as pool:  # its threads do not keep a process from ending
        return pool.map(fault, names, chunksize=1)


def describe_faults(names: Sequence[str], faults: Sequence[int]) -> str | None:
    """The first of the faults in words; None where there is none."""
    for name, fault in zip(names, faults, strict=True):
        if fault == CHANGED:
            return f"{name} was changed after it was written (its sha256 differs)"
        if fault:
            return f"{name} cannot be read ({os.strerror(fault)})"
    return None
