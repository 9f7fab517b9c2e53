"""Token files: a corpus tokenised once into flat memory-mapped arrays.

A folder holds, for the splits `train` and `eval`, `<split>.bin` (the token ids of all documents, each followed by
[SEP], as uint16, or uint32 for vocabularies above 65,536), `<split>_offsets.npy` (int64, where each document begins,
and the length) and, if asked for, `<split>_sentences.npy` (uint32, where each sentence begins), and `manifest.json`,
which is written last.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ds_stacking.data.arrays import Damaged, hash_inside, map_array, map_values
from ds_stacking.data.manifests import MANIFEST, SPLITS, CacheManifest, ShardManifest

__all__ = ["MANIFEST", "SPLITS", "Split", "SplitWriter", "TokenFile"]

_LOOKED_AT = 2**18
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
        manifest: ShardManifest | CacheManifest,
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
        if not all(_ascends(part) for part in _parts(offsets, whole)):
            return "documents that end before they begin"
        if sentences is not None and not all(
            _ascends(part) and part.max(initial=0) <= len(self) for part in _parts(sentences, whole)
        ):
            return "sentences that begin before the one before, or behind the end"
        if any(part.max(initial=0) >= vocab_size for part in _parts(self.tokens, whole)):
            return f"tokens beyond the {vocab_size:,} of its vocabulary"
        return None


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a corpus: the token files of its shards, read one behind another."""

    files: Sequence[TokenFile]
    """The shards."""

    def __len__(self) -> int:
        return sum(map(len, self.files))


@contextmanager
def split_writers(
    folder: Path, dtype: np.dtype, vocab_size: int
) -> Iterator[dict[Literal["train", "eval"], SplitWriter]]:
    """A writer of each split, whose files are closed in any case."""
    writers = {split: SplitWriter(folder, split, dtype, vocab_size) for split in SPLITS}
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.abandon()


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


def write_array(path: Path, values: np.ndarray) -> str:
    """Write an array as NumPy's .npy through to the disk; return the sha256 of the file."""
    with path.open("wb") as file:
        np.save(file, values)
        flush(file)
    return hash_inside(path.parent, path.name)


def hashes(split: Literal["train", "eval"], manifest: ShardManifest | CacheManifest) -> dict[str, str]:
    """The files of one split and their sha256."""
    facts = manifest[split]
    named = {f"{split}.bin": facts["sha256"], f"{split}_offsets.npy": facts["offsets_sha256"]}
    if "sentences_sha256" in facts:
        named[f"{split}_sentences.npy"] = facts["sentences_sha256"]
    return named


def _ascends(values: np.ndarray) -> bool:
    return bool(np.all(values[1:] > values[:-1]))  # a difference of unsigned values is never negative


def _parts(values: np.ndarray, whole: bool) -> Iterator[np.ndarray]:
    """An array in parts that overlap by one; of a large one, unless `whole`, so many places spread over it."""
    begins = range(0, len(values), _PART)
    if len(values) > _LOOKED_AT and not whole:
        begins = np.linspace(0, len(values) - _PART, _LOOKED_AT // _PART).astype(np.int64)  # type: ignore[assignment]
    for begin in begins:
        yield values[begin : begin + _PART + 1]


class SplitWriter:
    """Appends documents to one split of a folder and counts what it wrote."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, vocab_size: int, sentences: bool = False) -> None:
        self._folder, self._split = folder, split
        self._file = (folder / f"{split}.bin").open("wb")
        self._hash = sha256()
        self._lengths = array("q")
        self._sentences = array("I") if sentences else None
        self._dtype = dtype
        self.size = 0
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sentences: np.ndarray | None = None) -> None:
        """Append documents of `lengths` [D] tokens, [SEP] included, and where in `tokens` [N] sentences begin."""
        self._lengths.frombytes(lengths.astype(np.int64).tobytes())
        if self._sentences is not None:
            assert sentences is not None, "a split with sentences gets them for every document"
            self._sentences.frombytes((sentences + self.size).astype(np.uint32).tobytes())
        self.size += len(tokens)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        tokens = np.ascontiguousarray(tokens, self._dtype)
        self._hash.update(tokens.data)
        self._file.write(tokens.data)

    def close(self) -> dict[str, Any]:
        """Write the rest; return the split's part of the manifest."""
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(np.frombuffer(self._lengths, np.int64), out=offsets[1:])
        flush(self._file)
        self._file.close()
        facts = {
            "documents": len(self._lengths),
            "tokens": self.size,
            "sha256": self._hash.hexdigest(),
            "offsets_sha256": write_array(self._folder / f"{self._split}_offsets.npy", offsets),
        }
        if self._sentences is not None:
            starts = np.frombuffer(self._sentences, np.uint32)
            facts["sentences_sha256"] = write_array(self._folder / f"{self._split}_sentences.npy", starts)
        return facts

    def abandon(self) -> None:
        """Close the file, whatever is still to be written: the folder is about to be removed."""
        with suppress(OSError):  # such as of a full disk, once more
            self._file.close()


def flush(file: Any) -> None:
    """Write a file through to the disk."""
    file.flush()
    os.fsync(file.fileno())
