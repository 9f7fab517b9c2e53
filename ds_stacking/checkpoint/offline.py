"""A checkpoint made without engines, by growth on the disk in one process."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_stacking.checkpoint import durable
from ds_stacking.checkpoint.durable import FileRecord, file_sha256, write_file
from ds_stacking.checkpoint.format import INDEX, STATE, TEMPORARY, PieceFile, rank_file, tensors_file
from ds_stacking.checkpoint.index import index_bytes, index_rows
from ds_stacking.checkpoint.job import publish
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import Kind, StateWriter, TensorSlice


class CheckpointState(StateWriter):
    """A checkpoint in the making, for growth without engines in one process.

    The file is mapped into memory, so that what was written may leave it again. What is not written is zero.

        with CheckpointState(folder, step, plan.parameters, extra={}, identity={}) as target:
            execute(plan, CheckpointReader(path), target, OneRank())
            target.publish()
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        parameters: Mapping[str, ParameterInfo],
        *,
        extra: Mapping[str, Any],
        identity: Mapping[str, Any],
        generators: Sequence[bytes] = (),
    ) -> None:
        """Reserve the file in `folder`; nothing is to be seen there before `publish`. Raises OSError.

        `generators` holds the file of every rank's generators, for a run that goes on with as many ranks.
        """
        self.folder, self.step, self.identity = folder.absolute(), step, identity
        self.extra, self.generators = dict(extra), generators
        self.parameters = dict(parameters)
        self._wholes = {name: TensorSlice(name, 0, info.numel) for name, info in parameters.items()}
        self._layout = PieceFile(list(self._wholes.values()))
        self._temporary = self.folder / f"{TEMPORARY}step-{step}-{secrets.token_hex(8)}"
        durable.make_directory(self._temporary)
        self._path = self._temporary / tensors_file(0)
        try:
            self._elements = self._reserve()
        except OSError:
            self.__exit__()
            raise

    def __enter__(self) -> CheckpointState:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not published."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def slices(self) -> list[TensorSlice]:
        """Every tensor, whole."""
        return list(self._wholes.values())

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """A view into the file."""
        start = self._layout.position(self._wholes[piece.name], kind) + piece.start
        return self._elements[start : start + piece.numel]

    def commit(self, steps: Mapping[str, int]) -> None:
        """Keep the step counts."""
        self.parameters = {name: replace(info, step=steps[name]) for name, info in self.parameters.items()}

    def publish(self) -> Path:
        """Make it a checkpoint that is never pruned; its path. Raises OSError."""
        with open(self._path, "rb+") as file:
            os.fsync(file.fileno())
        parameters = {name: asdict(info) for name, info in self.parameters.items()}
        content = {"step": self.step, "parameters": parameters, "extra": self.extra}
        rows = index_rows(self._layout.pieces, self.parameters, rank=0)
        files = {
            tensors_file(0): FileRecord(self._layout.nbytes, file_sha256(self._path)),
            STATE: write_file(self._temporary / STATE, [json.dumps(content).encode()]),
            INDEX: write_file(self._temporary / INDEX, [index_bytes([rows])]),
        }
        for rank, states in enumerate(self.generators):
            files[rank_file(rank)] = write_file(self._temporary / rank_file(rank), [states])
        return publish(
            self._temporary,
            self.folder,
            step=self.step,
            keep=True,
            world_size=1,
            identity=dict(self.identity),
            files=files,
        )

    def _reserve(self) -> Tensor:
        """The file with its header, mapped into memory: its elements [3 * N] float32, all zero.

        Its blocks are taken at once, so that a full disk is an error here and not a crash on a later write.
        """
        header = self._layout.header
        with open(self._path, "xb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.posix_fallocate(file.fileno(), 0, self._layout.nbytes)
            file.write(header)
        mapped = torch.from_file(str(self._path), shared=True, size=self._layout.nbytes // 4, dtype=torch.float32)
        return mapped[len(header) // 4 :]
