"""Checkpoints as stores of training state: the one executor reads from them (`offline.py` writes to them).

A reader serves any number of ranks under any ZeRO stage, whatever wrote the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ds_stacking.checkpoint.format import MANIFEST, STATE
from ds_stacking.checkpoint.index import PieceIndex
from ds_stacking.checkpoint.manifest import Number, Unusable, read_manifest
from ds_stacking.common.errors import UserError
from ds_stacking.common.generators import Generators, check_generators
from ds_stacking.common.json_files import KEEP_OTHERS, read_json
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import Kind, TensorSlice

Name = Annotated[str, Field(min_length=1, max_length=500)]
RESTORE = "restore that file"


class _Parameter(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    numel: Number
    decay: bool
    birth: NotRequired[Number]
    step: NotRequired[Number]


class _State(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    step: Number
    parameters: dict[Name, _Parameter]
    extra: dict[str, Any]


class CannotLoad(UserError):
    """A checkpoint that cannot be loaded, and the `reason`, as the end of such a sentence."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"Checkpoint {path} cannot be loaded: {reason}; choose another one.")
        self.reason = reason


class CheckpointReader:
    """The state in a checkpoint (StateReader of ds_stacking.growth.state); all ranks see all of it.

    Files are mapped into memory: a rank reads from the disk only what it asks for. `find` or `newest_valid`
    (ds_stacking.checkpoint.select) comes first; here only state.json and the index are checked. Raises CannotLoad
    where something in them is missing or of a wrong type, or the tensors do not cover the parameters.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._one_sentence():
            self.manifest = read_manifest(path)
            content = read_json(path / STATE, _State, mend=RESTORE, inside=path)
            self.step: int = content["step"]
            self.parameters = {name: _parameter(info) for name, info in content["parameters"].items()}
            self.extra: dict[str, Any] = content["extra"]
            if self.step != self.manifest.step:
                raise Unusable(f"{STATE} is of step {self.step}, and {MANIFEST} of step {self.manifest.step}")
            self._pieces = PieceIndex(path, self.manifest, self.parameters)

    @property
    def steps(self) -> dict[str, int]:
        """Adam's step count of every parameter."""
        return {name: info.step for name, info in self.parameters.items()}

    def check(self) -> None:
        """Look at all that is read later: the headers of all files and all generators. Raises CannotLoad."""
        with self._one_sentence():
            self._pieces.check()
        for path in self.generator_files():
            self._read_generators(path)

    def generators(self, rank: int, world_size: int) -> Generators | None:
        """The generators of `rank` for `restore_generators`; None where another number of ranks trained.

        At another world size no saved state is right: two ranks must never draw the same dropout masks.
        """
        files = self.generator_files()
        return self._read_generators(files[rank]) if len(files) == world_size else None

    def generator_files(self) -> list[Path]:
        """The file of every rank's generators."""
        names = sorted(name for name in self.manifest.files if re.fullmatch(r"rank-[0-9]{5}\.json", name))
        return [self.path / name for name in names]

    def slices(self) -> list[TensorSlice]:
        """Every tensor, whole, on every rank."""
        return [TensorSlice(name, 0, info.numel) for name, info in self.parameters.items()]

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """The elements of `piece`: [N] float32; a view of the mapped file where they lie in one."""
        with self._one_sentence():
            parts = list(self._pieces.parts(piece, kind))
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def _read_generators(self, path: Path) -> Generators:
        with self._one_sentence():
            states = read_json(path, Generators, mend=RESTORE, inside=self.path, limit=1 << 20)
            check_generators(states, path)
        return states

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        """Turn what goes wrong in the body into CannotLoad."""
        try:
            yield
        except (Unusable, UserError) as error:
            raise CannotLoad(self.path, str(error).rstrip(".")) from None
        except OSError as error:
            raise CannotLoad(self.path, f"{error.filename} cannot be read ({error.strerror})") from None


def find_fault(path: Path, fits: Callable[[CheckpointReader], None]) -> str | None:
    """Why the checkpoint at `path`, whose files are as they were written, cannot be loaded; None where it can.

    `fits` raises UserError where what a run has put into it is not what a run needs.
    """
    try:
        reader = CheckpointReader(path)
        reader.check()
        fits(reader)
    except CannotLoad as error:
        return error.reason
    except UserError as error:
        return str(error).rstrip(".")
    return None


def _parameter(info: _Parameter) -> ParameterInfo:
    return ParameterInfo(
        numel=info["numel"], decay=info["decay"], birth=info.get("birth", 0), step=info.get("step", 0)
    )
