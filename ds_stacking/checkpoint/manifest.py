"""The manifest: what a checkpoint consists of. Where it stands, every other file was complete on the disk before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_stacking.checkpoint.durable import FileRecord
from ds_stacking.checkpoint.format import FILE_NAME, FORMAT, MANIFEST, READABLE, VERSION

LARGEST_MANIFEST = 1 << 26
"""Bytes; more is not read."""


class Unusable(Exception):
    """A checkpoint that must not be loaded. Its text says why, as the end of the sentence "it is skipped: ..."."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    """Optimizer steps made."""
    sequence: int
    """Counts the checkpoints of a folder. A run that went back to an earlier step overtakes what it left behind."""
    keep: bool
    """Never pruned (a stage's end)."""
    world_size: int
    """Ranks that wrote it."""
    identity: Mapping[str, Any]
    """What a run must have in common with the one that wrote it, as plain JSON values: architecture, recipe."""
    files: Mapping[str, FileRecord]
    """Every other file by name."""

    def to_bytes(self) -> bytes:
        """JSON with a checksum of its own."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["files"] = {name: record._asdict() for name, record in sorted(self.files.items())}
        return json.dumps(content | {"sha256": _checksum(content)}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises Unusable where there is none that can be believed."""
    content = _read_json(path / MANIFEST)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Unusable(f"its {MANIFEST} is not one of a {FORMAT}")
    if content.get("version") not in READABLE:
        versions = " and ".join(map(str, READABLE))
        raise Unusable(f"it has format version {content.get('version')}, and this program reads versions {versions}")
    if content.pop("sha256", None) != _checksum(content):
        raise Unusable(f"its {MANIFEST} was changed after it was written")
    del content["format"], content["version"]
    try:
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (AttributeError, KeyError, TypeError):
        raise Unusable(f"its {MANIFEST} lacks something or holds too much") from None
    foreign = [name for name in files if not FILE_NAME.fullmatch(name)]
    if foreign:
        raise Unusable(f"its {MANIFEST} names {foreign[0]!r}, which is no file of a checkpoint")
    return manifest


def _read_json(path: Path) -> Any:
    try:
        if not path.is_file() or path.is_symlink():
            raise Unusable(f"it has no {path.name}")
        if path.stat().st_size > LARGEST_MANIFEST:
            raise Unusable(f"its {path.name} is larger than {LARGEST_MANIFEST} bytes")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise Unusable(f"its {path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Unusable(f"its {path.name} is empty or no JSON") from None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
