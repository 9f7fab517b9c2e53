"""Hugging Face folders as stores of training state: weights only, one or many safetensors files, larger than memory.

Tensors are read and written through memory maps, in the type in which the folder holds them; growth computes in fp32.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.common.model_folder import (
    CONFIG,
    INDEX,
    SINGLE,
    TEXTS,
    TOKENIZER_FILES,
    check_folder,
    model_file,
    weight_files,
    weight_map,
)
from ds_stacking.common.words import shown
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo
from ds_stacking.growth.state import Kind, TensorSlice

LONGEST_NAME = 500
"""Characters of a tensor's name."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPES |= {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""How configurations name the number of blocks."""
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as a folder holds it."""

    dtype: str
    """safetensors' name of the type."""
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class HuggingFaceReader:
    """The weights in a Hugging Face folder (StateReader); every rank sees all of them. Raises UserError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = check_folder(folder)
        if self.config.get("auto_map"):
            raise UserError(
                f"{folder / CONFIG} names code of its own ({shown(self.config['auto_map'])}), which is not run and "
                f"not copied; remove auto_map there, and copy the code to the grown model yourself if you trust it."
            )
        try:
            self._files = {name: safe_open(path, framework="pt") for name, path in weight_files(folder).items()}
            self.tensors = self._describe()
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be read ({error.strerror or error}).") from None
        except SafetensorError as error:
            raise UserError(
                f"The safetensors files of {folder} are damaged ({str(error)[:200]}); restore them."
            ) from None
        if not self.tensors:
            raise UserError(f"The safetensors files of {folder} hold no tensors; restore them.")

    @property
    def parameters(self) -> dict[str, ParameterInfo]:
        """What a plan must know of the tensors."""
        return {name: ParameterInfo(numel=math.prod(t.shape), decay=True) for name, t in self.tensors.items()}

    def slices(self) -> list[TensorSlice]:
        """Every tensor, whole."""
        return [TensorSlice(name, 0, info.numel) for name, info in self.parameters.items()]

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """The elements of `piece`: [N] float32. Only `master` is there."""
        assert kind == "master", "a Hugging Face folder has no moments"
        whole = self._files[self.tensors[piece.name].file].get_tensor(piece.name)
        return whole.flatten()[piece.start : piece.stop].to(torch.float32)

    def _describe(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for file, opened in self._files.items():
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = opened.get_slice(name)
                if len(name) > LONGEST_NAME:
                    raise UserError(f"{self.folder / file} holds the tensor {shown(name)}, a name too long to be one.")
                if name in found:
                    raise UserError(
                        f"The tensor {shown(name)} of {self.folder} lies in {found[name].file} and {file}; keep one."
                    )
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{self.folder / file}: {shown(name)} has the type {part.get_dtype()}, which growth cannot "
                        f"convert; convert the weights to fp32."
                    )
                found[name] = StoredTensor(dtype=part.get_dtype(), shape=tuple(part.get_shape()), file=file)
        for name, file in weight_map(self.folder).items():
            if name not in found or found[name].file != file:
                raise UserError(
                    f"{self.folder / INDEX} says that {shown(name)} lies in {shown(file)}, which lacks it; restore "
                    f"the index or that file."
                )
        return found


class HuggingFaceWriter:
    """A grown Hugging Face folder in the making (StateWriter), in an empty folder.

    Files are reserved with their headers and mapped into memory.

        with whole_folder(target) as unfinished:
            writer = HuggingFaceWriter(unfinished, plan, reader)
            execute(plan, reader, writer, OneRank(), kinds=("master",))
            writer.finish()
    """

    def __init__(
        self, folder: Path, plan: GrowthPlan, reader: HuggingFaceReader, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.plan, self.reader = folder, plan, reader
        self.config = grown_config(reader.config, plan, reader.folder)
        self._views: dict[str, Tensor] = {}
        self._file_of = self._reserve(shard_bytes)

    def slices(self) -> list[TensorSlice]:
        """Every tensor, whole."""
        return [TensorSlice(entry.target, 0, entry.info.numel) for entry in self.plan.entries]

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """The elements of `piece`: [N] float32."""
        return self._views[piece.name][piece.start : piece.stop].to(torch.float32)

    def write(self, piece: TensorSlice, kind: Kind, values: Tensor) -> None:
        """Put the elements into the file, rounded to its type."""
        self._views[piece.name][piece.start : piece.stop] = values

    def commit(self, steps: Mapping[str, int]) -> None:
        """Weights have no step counts."""

    def finish(self) -> None:
        """Add configuration, index and the other files of the source. Raises OSError."""
        for name in other_files(self.reader.folder):
            shutil.copyfile(model_file(self.reader.folder, name), self.folder / name)
        write_json(self.folder / CONFIG, self.config)
        if set(self._file_of.values()) != {SINGLE}:
            total = sum(view.numel() * view.element_size() for view in self._views.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            write_json(self.folder / INDEX, index)
        self._views.clear()

    def _reserve(self, shard_bytes: int) -> dict[str, str]:
        """Make the files; returns the file of every tensor."""
        tensors = {e.target: self.reader.tensors[e.source] for e in self.plan.entries if e.source is not None}
        shards: list[list[str]] = [[]]
        room = shard_bytes
        for name, stored in tensors.items():
            if stored.nbytes > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append(name)
            room -= stored.nbytes
        one = len(shards) == 1
        file_of: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = SINGLE if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._views |= _reserve_file(self.folder / file, {name: tensors[name] for name in names})
            file_of |= dict.fromkeys(names, file)
        return file_of


def other_files(folder: Path) -> list[str]:
    """The files that a grown model takes over as they are: tokenizer, texts, licence. Raises UserError for a link."""
    names = [name for name in (*TOKENIZER_FILES, *TEXTS) if os.path.lexists(folder / name)]
    for name in names:
        try:
            model_file(folder, name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror}); restore or remove it.") from None
    return names


def left_behind(folder: Path) -> list[str]:
    """What else lies in a folder beside its weights, and is not taken over."""
    taken = {CONFIG, INDEX, *TOKENIZER_FILES, *TEXTS}
    return sorted(path.name for path in folder.iterdir() if path.name not in taken and path.suffix != ".safetensors")


def grown_config(config: Mapping[str, Any], plan: GrowthPlan, folder: Path) -> dict[str, Any]:
    """The configuration with the new depth; lists with one item per block, such as layer_types, grow as the blocks."""
    keys = [key for key in DEPTH_KEYS if config.get(key) == plan.from_layers]
    if not keys:
        raise UserError(
            f"{folder / CONFIG} names no depth of {plan.from_layers} under {', '.join(DEPTH_KEYS)}, but that many "
            f"blocks were found; its weights belong to another configuration."
        )
    grown = dict(config) | dict.fromkeys(keys, plan.to_layers)
    for key, value in config.items():
        if key.startswith("layer") and isinstance(value, list) and len(value) == plan.from_layers:
            grown[key] = [value[layer] for layer in plan.layers if layer is not None]
    return grown


def _reserve_file(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """A safetensors file with its header; returns flat views of its tensors. A full disk is an error here."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    by_alignment = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    for name in by_alignment:
        stored = tensors[name]
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": (at, at + stored.nbytes)}
        at += stored.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with open(path, "xb") as file:
        os.posix_fallocate(file.fileno(), 0, begin + at)
        file.write(len(text).to_bytes(8, "little") + text)
    mapped = torch.from_file(str(path), shared=True, size=begin + at, dtype=torch.uint8)
    return {
        name: mapped[begin + header[name]["data_offsets"][0] : begin + header[name]["data_offsets"][1]].view(
            DTYPES[tensors[name].dtype]
        )
        for name in by_alignment
    }
