"""One rank's share of writing a checkpoint, and on rank 0 its publication.

It runs in the background and makes no collective call. Ranks meet through files in the temporary directory: each
leaves a mark when its files are on the disk, or says what went wrong; rank 0 waits for the marks, writes the manifest
and publishes the directory by one rename.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from ds_stacking.checkpoint import durable
from ds_stacking.checkpoint.durable import FileRecord, write_file
from ds_stacking.checkpoint.format import INDEX, MANIFEST, STATE, TEMPORARY, PieceFile, rank_file, tensors_file
from ds_stacking.checkpoint.index import Rows, index_bytes, index_rows
from ds_stacking.checkpoint.manifest import Manifest, Number
from ds_stacking.checkpoint.select import published
from ds_stacking.common.files import sync_directory
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.common.own_files import read_inside

POLL, SLOWEST_POLL = 0.02, 1.0
"""Seconds between the first two looks for the marks of the other ranks, and between later ones, at most."""
MARK = re.compile(r"\.rank-(\d{5})\.(done|failed)")


class _Mark(TypedDict):
    """What a rank says when its files are on the disk."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    files: dict[str, tuple[Number, str]]
    pieces: list[tuple[Number, Number, Number, Number]]


class SaveError(Exception):
    """A checkpoint could not be written. Its text says why."""


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """Everything that one rank needs to write its share; nothing in it changes any more."""

    folder: Path
    """The folder of checkpoints."""
    attempt: int
    """A number that all ranks share and no other save has."""
    rank: int
    world_size: int
    step: int
    keep: bool
    identity: Mapping[str, Any]
    state: bytes
    """Content of state.json; rank 0 writes it."""
    generators: bytes
    """Content of this rank's JSON file."""
    file: PieceFile
    """What this rank's safetensors file holds."""
    names: Sequence[str]
    """All parameters, in the order of state.json."""
    patience: float
    """Seconds that rank 0 waits for the others after it has written its own share."""

    @property
    def temporary(self) -> Path:
        """Where the checkpoint is put together."""
        return self.folder / f"{TEMPORARY}step-{self.step}-{self.attempt:x}"

    def write_share(self, values: Tensor) -> None:
        """Write and fsync this rank's files, then its mark. Raises OSError.

        `values` is the content of the safetensors file: [3 * N] float32 on the host.
        """
        durable.make_directory(self.temporary)
        self._check_space()
        contents: dict[str, list[bytes | memoryview]] = {
            tensors_file(self.rank): [self.file.header, values.numpy().data],
            rank_file(self.rank): [self.generators],
        }
        if self.rank == 0:
            contents[STATE] = [self.state]
        records = {name: write_file(self.temporary / name, parts) for name, parts in contents.items()}
        sync_directory(self.temporary)
        rows = index_rows(self.file.pieces, self.names, self.rank)
        self._mark("done", json.dumps({"files": records, "pieces": rows}).encode())

    def publish(self) -> Path:
        """Rank 0: wait for all, write index and manifest, give the checkpoint its name. Raises OSError, SaveError."""
        records, tables = self._gather()
        records[INDEX] = write_file(self.temporary / INDEX, [index_bytes(tables)])
        return publish(
            self.temporary,
            self.folder,
            step=self.step,
            keep=self.keep,
            world_size=self.world_size,
            identity=self.identity,
            files=records,
        )

    def give_up(self, reason: str) -> None:
        """Free the space that this rank took and tell rank 0; rank 0 removes the whole. Raises nothing."""
        if self.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        with suppress(OSError):
            durable.make_directory(self.temporary)
            for name in (tensors_file(self.rank), rank_file(self.rank)):
                (self.temporary / name).unlink(missing_ok=True)
            self._mark("failed", reason.encode())

    def _check_space(self) -> None:
        """A disk filled to the brim would stop the run's other files too. All ranks write about as much at once."""
        if shutil.disk_usage(self.temporary).free < self.world_size * self.file.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.temporary))

    def _mark_path(self, what: str, rank: int) -> Path:
        return self.temporary / f".rank-{rank:05d}.{what}"

    def _mark(self, what: str, content: bytes) -> None:
        """Rank 0 must never read half a mark, so it too appears by a rename."""
        unfinished = self._mark_path("part", self.rank)
        write_file(unfinished, [content])
        os.rename(unfinished, self._mark_path(what, self.rank))

    def _gather(self) -> tuple[dict[str, FileRecord], list[Rows]]:
        """The records of all ranks' files and the pieces in them, once all marks are there; the marks are removed."""
        records: dict[str, FileRecord] = {}
        tables: list[Rows] = []
        missing = set(range(self.world_size))
        end, pause = time.monotonic() + self.patience, POLL
        while missing:
            for rank, what in self._marks(missing):
                path = self._mark_path(what, rank)
                if what == "failed":
                    words = read_inside(self.temporary, path.name, limit=1 << 20)
                    raise SaveError(f"rank {rank}: {words.decode(errors='replace')}")
                mark = read_json(path, _Mark, mend="the checkpoint is given up", inside=self.temporary)
                records |= {name: FileRecord(*record) for name, record in mark["files"].items()}
                tables.append(mark["pieces"])
                path.unlink()
                missing.remove(rank)
            if missing and time.monotonic() > end:
                raise SaveError(f"rank {min(missing)} had not written its share after {self.patience:.0f} s")
            if missing:
                time.sleep(pause)
                pause = min(1.5 * pause, SLOWEST_POLL)
        return records, tables

    def _marks(self, missing: set[int]) -> Iterator[tuple[int, str]]:
        """The marks of ranks among `missing`, failures first: one listing of the directory, not a look-up per rank."""
        found = [match.groups() for name in os.listdir(self.temporary) if (match := MARK.fullmatch(name))]
        marks = [(int(rank), what) for rank, what in found if int(rank) in missing]
        return iter(sorted(marks, key=lambda mark: (mark[1] != "failed", mark[0])))


def publish(temporary: Path, folder: Path, *, files: Mapping[str, FileRecord], step: int, **fields: Any) -> Path:
    """Complete the checkpoint in `temporary` with its manifest and give it its name in `folder`. Raises OSError.

    A checkpoint of the same step that stands there already stays until the new one is published.
    """
    others = [manifest.sequence for _, manifest in published(folder) if isinstance(manifest, Manifest)]
    manifest = Manifest(step=step, sequence=1 + max(others, default=0), files=files, **fields)
    write_file(temporary / MANIFEST, [manifest.to_bytes()])
    sync_directory(temporary)
    path = _free_name(folder, step)
    os.rename(temporary, path)
    sync_directory(folder)
    return path


def explain(error: Exception) -> str:
    """What went wrong, for a line in the log."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _free_name(folder: Path, step: int) -> Path:
    path, number = folder / f"step-{step}", 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"step-{step}-{number}"
    return path
