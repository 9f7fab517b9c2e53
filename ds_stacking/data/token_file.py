"""Token files: a corpus tokenised once into flat memory-mapped arrays.

A folder holds, for the splits `train` and `eval`, `<split>.bin` (the token ids of all documents, each followed by
[SEP], as uint16, or uint32 for vocabularies above 65,536), `<split>_offsets.npy` (int64, where each document begins,
and the length) and, if asked for, `<split>_sentences.npy` (uint32, where each sentence begins). They may have come
from somebody else: no link is followed, nothing is unpickled, types and sizes must be those that are expected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from ds_stacking.common.errors import UserError
from ds_stacking.common.own_files import open_inside
from ds_stacking.data.manifests import Damaged, ShardManifest

LOOKED_AT = 2**18
"""Values of a larger array that are looked at when it is opened."""
_PART = 2**14


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One split of one folder."""

    tokens: np.ndarray
    """Token ids of all documents, [N] uint16 or uint32, memory-mapped."""
    offsets: np.ndarray
    """Where each document begins in `tokens`, then N: [documents + 1] int64, memory-mapped."""
    sentences: np.ndarray | None = None
    """Where each sentence begins in `tokens`, ascending, [S] uint32, memory-mapped; None where nobody asked."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def open(
        cls,
        folder: Path,
        split: Literal["train", "eval"],
        manifest: ShardManifest,
        *,
        inside: Path | None = None,
        whole: bool = False,
    ) -> TokenFile:
        """Map one split of a folder, no link below `inside` followed.

        Raises Damaged if its files have not the sizes that the manifest states, or hold what cannot be: offsets that
        do not ascend, ids beyond the vocabulary. Of large arrays places spread evenly are looked at, or with `whole`
        all.
        """
        facts, dtype = manifest[split], token_type(manifest["vocab_size"])
        root = inside or folder
        stem = str(folder.relative_to(root) / split)
        if manifest["dtype"] != dtype.name:
            raise Damaged(f"{folder} has ids of type {manifest['dtype']}, not {dtype}; prepare these data again.")
        opened = cls(
            tokens=map_values(root, f"{stem}.bin", dtype, facts["tokens"]),
            offsets=map_array(root, f"{stem}_offsets.npy", np.int64),
            sentences=map_array(root, f"{stem}_sentences.npy", np.uint32) if "sentences_sha256" in facts else None,
        )
        if fault := opened._find_fault(facts["documents"], manifest["vocab_size"], whole):
            raise Damaged(f"The {split} split in {folder} has {fault}; prepare these data again.")
        return opened

    def _find_fault(self, documents: int, vocab_size: int, whole: bool) -> str | None:
        """What these arrays hold that no corpus of so many documents does."""
        offsets, sentences = self.offsets, self.sentences
        if len(offsets) != documents + 1 or offsets[0] != 0 or offsets[-1] != len(self):
            return f"offsets that are not those of {documents:,} documents and {len(self):,} tokens"
        if not all(_ascends(part) for part in looked_at(offsets, whole)):
            return "documents that end before they begin"
        if sentences is not None and not all(
            _ascends(part) and part.max(initial=0) <= len(self) for part in looked_at(sentences, whole)
        ):
            return "sentences that begin before the one before, or behind the end"
        if any(part.max(initial=0) >= vocab_size for part in looked_at(self.tokens, whole)):
            return f"tokens beyond the {vocab_size:,} of its vocabulary"
        return None


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a corpus: the token files of its shards, read one behind another."""

    files: Sequence[TokenFile]
    """The shards."""

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def digest(self) -> str:
        """sha256 of the token ids, however they are spread over shards."""
        hashed = sha256()
        for file in self.files:
            hashed.update(np.ascontiguousarray(file.tokens).data)  # no copy: they lie in one piece
        return hashed.hexdigest()


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def unigram_entropy(counts: np.ndarray, special: tuple[int, ...]) -> float:
    """Return the entropy in nats of the frequencies of ordinary tokens, `counts` [vocab_size].

    It is the loss of the best guess that looks at no context, so a model must fall below it.
    """
    counts = counts.astype(np.float64)
    counts[list(special)] = 0
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def hashes(split: Literal["train", "eval"], manifest: ShardManifest) -> dict[str, str]:
    """The files of one split and their sha256."""
    facts = manifest[split]
    named = {f"{split}.bin": facts["sha256"], f"{split}_offsets.npy": facts["offsets_sha256"]}
    if "sentences_sha256" in facts:
        named[f"{split}_sentences.npy"] = facts["sentences_sha256"]
    return named


def _ascends(values: np.ndarray) -> bool:
    return bool(np.all(values[1:] > values[:-1]))  # a difference of unsigned values is never negative


def looked_at(values: np.ndarray, whole: bool, most: int = LOOKED_AT) -> Iterator[np.ndarray]:
    """An array in parts that overlap by one; of one with more than `most` values, unless `whole`, parts spread over it
    that have as many."""
    begins = range(0, len(values), _PART)
    if len(values) > most and not whole:
        begins = np.linspace(0, len(values) - _PART, most // _PART).astype(np.int64)  # type: ignore[assignment]
    for begin in begins:
        yield values[begin : begin + _PART + 1]


def map_array(folder: Path, name: str, dtype: DTypeLike, columns: int = 0) -> np.ndarray:
    """Map the .npy file `name` of `folder` for reading: [N], or with `columns` [N, columns].

    Raises Damaged, also for a file that is not there.
    """
    path = folder / name
    with open(_open(folder, name), "rb") as file:
        try:
            if npy.read_magic(file) != (1, 0):  # only later versions have headers of more than 64 kB
                raise ValueError("a version of .npy that nobody writes here")
            shape, fortran_order, found = npy.read_array_header_1_0(file)
        except (ValueError, EOFError, RecursionError, MemoryError) as error:
            raise Damaged(f"{path} is no array ({str(error)[:80]!r}); make it again.") from None
        expected = np.dtype(dtype)
        right_shape = len(shape) == 1 + bool(columns) and (not columns or shape[1] == columns)
        if found != expected or fortran_order or not right_shape or shape[0] < 0:
            raise Damaged(f"{path} holds {found} of shape {str(shape)[:80]}, not {expected}; make it again.")
        return _map(file.fileno(), path, expected, shape, file.tell())


def map_values(folder: Path, name: str, dtype: DTypeLike, count: int) -> np.ndarray:
    """Map the file `name` of `folder`, `count` values and nothing else, for reading: [count]. Raises Damaged."""
    with open(_open(folder, name), "rb") as file:
        return _map(file.fileno(), folder / name, np.dtype(dtype), (count,), 0)


def hash_inside(folder: Path, name: str) -> str:
    """Return the sha256 of the file `name` of `folder`, no link followed. Raises Damaged."""
    hashed = sha256()
    with open(_open(folder, name), "rb") as file:
        while chunk := file.read(2**20):
            hashed.update(chunk)
    return hashed.hexdigest()


def _open(folder: Path, name: str) -> int:
    try:
        return open_inside(folder, name)
    except UserError as error:
        raise Damaged(str(error)) from None
    except OSError as error:
        raise Damaged(f"{folder / name} cannot be read ({error.strerror}); make it again.") from None


def _map(handle: int, path: Path, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> np.ndarray:
    size, needed = os.fstat(handle).st_size, begin + dtype.itemsize * int(np.prod(shape, dtype=object))
    if size != needed:
        raise Damaged(f"{path} has {size:,} bytes instead of {needed:,}; make it again.")
    if size == begin:
        return np.zeros(shape, dtype)
    with open(handle, "rb", closefd=False) as file:
        return np.memmap(file, dtype, "r", begin, shape)
