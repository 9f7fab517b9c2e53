"""Safetensors files of a model, written tensor by tensor as these come: one file, or several with an index."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The names that transformers looks for."""
SHARD_BYTES = 5_000_000_000
"""Most bytes of a file, a single larger tensor apart: models of up to 1.2 billion fp32 weights stay one file."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class ShardWriter:
    """Writes tensors of known shapes in any order; the files have their names once all tensors are there.

        with ShardWriter(folder, shapes, torch.float32) as writer:
            writer.write(name, tensor)

    Raises OSError. Where the body fails, nothing is left in `folder`.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self._file_of = dict(_file_names(self._sizes(), shard_bytes))
        self._files = ExitStack()
        self._open: dict[str, BinaryIO] = {}
        self._places: dict[str, int] = {}

    def __enter__(self) -> ShardWriter:
        try:
            for file in dict.fromkeys(self._file_of.values()):
                self._reserve(file)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Give the files their names, or remove them."""
        if failed:
            self._abandon()
            return
        assert not self._places, f"{next(iter(self._places))} was not written"
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        self._files.close()
        for name in self._open:
            os.replace(self._unfinished(name), self.folder / name)
        if SINGLE not in self._open:
            total = {"total_size": sum(self._sizes().values())}
            (self.folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": self._file_of}, indent=2))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place, once."""
        assert tensor.shape == self.shapes[name], name
        values = tensor.detach().to("cpu", self.dtype).contiguous()
        file = self._open[self._file_of[name]]
        file.seek(self._places.pop(name))
        file.write(values.flatten().view(torch.uint8).numpy().data)

    def _sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) * self.dtype.itemsize for name, shape in self.shapes.items()}

    def _reserve(self, file: str) -> None:
        """Make a file with its header, in its full size: a full disk is an error here."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, size in self._sizes().items():
            if self._file_of[name] == file:
                shape = list(self.shapes[name])
                header[name] = {"dtype": DTYPES[self.dtype], "shape": shape, "data_offsets": [at, at + size]}
                self._places[name] = at
                at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self._open[file] = opened = self._files.enter_context(open(self._unfinished(file), "wb"))  # noqa: SIM115 (the stack closes it)
        os.posix_fallocate(opened.fileno(), 0, begin + at)
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in header.keys() - {"__metadata__"}:
            self._places[name] += begin

    def _unfinished(self, file: str) -> Path:
        return self.folder / f".{file}.part"

    def _abandon(self) -> None:
        with suppress(OSError):  # what a full disk did not take may still wait in a buffer
            self._files.close()
        for name in self._open:
            self._unfinished(name).unlink(missing_ok=True)


def _file_names(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[tuple[str, str]]:
    """The file of every tensor: files are filled in the tensors' order."""
    numbers: dict[str, int] = {}
    number, room = 1, shard_bytes
    for name, size in sizes.items():
        if size > room and room < shard_bytes:
            number, room = number + 1, shard_bytes
        numbers[name], room = number, room - size
    for name, shard in numbers.items():
        yield name, SINGLE if number == 1 else f"model-{shard:05d}-of-{number:05d}.safetensors"
