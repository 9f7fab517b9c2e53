"""The manifest: what a checkpoint consists of. Where it stands, every other file was complete on the disk before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.checkpoint.durable import FileRecord
from ds_stacking.checkpoint.format import (
    FILE_NAME,
    FORMAT,
    INDEX,
    MANIFEST,
    MOST_RANKS,
    READABLE,
    STATE,
    VERSION,
    tensors_file,
)
from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, parse_json
from ds_stacking.common.own_files import read_inside
from ds_stacking.common.words import shown

LARGEST_MANIFEST = 1 << 26
"""Bytes; more is not read."""


Shape = TypeVar("Shape")
LARGEST = 2**53
"""Steps, sequence numbers and sizes of files lie below this."""
Number = Annotated[Count, Field(lt=LARGEST)]


class _Record(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    size: Number
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Identity(TypedDict):
    """What a run has put there: older versions had no settings."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    settings: NotRequired[dict[str, Any]]


class _Fields(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    version: int
    step: Number
    sequence: Number
    keep: bool
    world_size: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    identity: _Identity
    files: dict[str, _Record]


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
        return json.dumps(content | {"sha256": checksum(content)}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises Unusable where there is none that can be believed."""
    text = _read(path)
    content = _parse(text, dict[str, Any])
    if content.get("format") != FORMAT:
        raise Unusable(f"its {MANIFEST} is not one of a {FORMAT}")
    if content.get("version") not in READABLE:
        versions = " and ".join(map(str, READABLE))
        raise Unusable(
            f"it has format version {shown(content.get('version'))}, and this program reads versions {versions}"
        )
    if content.pop("sha256", None) != checksum(content):
        raise Unusable(f"its {MANIFEST} was changed after it was written")
    fields = _parse(text, _Fields)
    manifest = Manifest(
        step=fields["step"],
        sequence=fields["sequence"],
        keep=fields["keep"],
        world_size=fields["world_size"],
        identity=dict(fields["identity"]),
        files={name: FileRecord(record["size"], record["sha256"]) for name, record in fields["files"].items()},
    )
    _check_files(manifest, with_index=fields["version"] > 1)
    return manifest


def _check_files(manifest: Manifest, *, with_index: bool) -> None:
    """Raise Unusable where the manifest names what is no file of a checkpoint, or lacks one that must be there."""
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name):
            raise Unusable(f"its {MANIFEST} names {shown(name)}, which is no file of a checkpoint")
    found = {name for name in manifest.files if re.fullmatch(r"rank-.*\.safetensors", name)}
    needed = [STATE, *([INDEX] if with_index else [])]
    if len(found) >= manifest.world_size:  # not a list of a hundred thousand names for a file that lies
        needed += [tensors_file(rank) for rank in range(manifest.world_size)]
    lacking = [name for name in needed if name not in manifest.files]
    if lacking or len(found) != manifest.world_size:
        what = f"lacks {lacking[0]}" if lacking else f"has the tensors of {len(found)} ranks"
        raise Unusable(f"its {MANIFEST} {what}, but its world_size is {manifest.world_size}")


def _parse(text: bytes, shape: type[Shape]) -> Shape:
    try:
        return parse_json(text, shape, where=f"its {MANIFEST}", mend="restore it")
    except UserError as error:
        raise Unusable(str(error).rstrip(".")) from None


def _read(path: Path) -> bytes:
    try:
        return read_inside(path, MANIFEST, limit=LARGEST_MANIFEST)
    except UserError as error:
        raise Unusable(str(error).rstrip(".")) from None
    except FileNotFoundError:
        raise Unusable(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise Unusable(f"its {MANIFEST} cannot be read ({error.strerror})") from None


def checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
