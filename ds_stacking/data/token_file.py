"""Token files: a corpus tokenised once into flat memory-mapped arrays.

A folder holds, for the splits `train` and `eval`, `<split>.bin` (the token ids of all documents, each followed by
[SEP], as uint16, or uint32 for vocabularies above 65,536), `<split>_offsets.npy` (int64, where each document begins,
and the length) and, if asked for, `<split>_sentences.npy` (uint32, where each sentence begins), and `manifest.json`,
which is written last.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ds_stacking.common.errors import UserError
from ds_stacking.data.documents import is_held_out
from ds_stacking.data.tokenizer import SpecialIds

SPLITS = ("train", "eval")
MANIFEST = "manifest.json"
_BATCH_CHARACTERS = 2_000_000


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
    def open(cls, folder: Path, split: str, manifest: dict[str, Any]) -> TokenFile:
        """Map one split of a folder; UserError if its files have not the sizes that the manifest states."""
        path, dtype, count = folder / f"{split}.bin", np.dtype(manifest["dtype"]), manifest[split]["tokens"]
        try:
            offsets = np.load(folder / f"{split}_offsets.npy", mmap_mode="r")
            has_sentences = "sentences_sha256" in manifest[split]
            sentences = np.load(folder / f"{split}_sentences.npy", mmap_mode="r") if has_sentences else None
            complete = path.stat().st_size == count * dtype.itemsize and offsets[-1] == count
        except (OSError, ValueError):  # gone, or cut short
            complete = False
        if not complete:
            raise UserError(f"The prepared data in {folder} are damaged; delete that folder and start again.")
        tokens = np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
        return cls(tokens=tokens, offsets=offsets, sentences=sentences)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a corpus: the token files of its shards, read one behind another."""

    files: Sequence[TokenFile]
    """The shards."""

    def __len__(self) -> int:
        return sum(map(len, self.files))


def write_token_files(
    folder: Path,
    documents: Iterable[str],
    encoder: Tokenizer,
    special: SpecialIds,
    vocab_size: int,
    eval_percent: float,
) -> dict[str, Any]:
    """Tokenise documents into `folder`, batches in parallel on all cores; return the manifest's part on the arrays."""
    dtype = token_type(vocab_size)
    writers = {split: SplitWriter(folder, split, dtype, vocab_size) for split in SPLITS}
    for texts in _in_batches(documents):
        encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        held_out = [is_held_out(text, eval_percent) for text in texts]
        for split, writer in writers.items():
            ids = [
                [*encoding.ids, special.sep]
                for encoding, out in zip(encodings, held_out, strict=True)
                if out == (split == "eval") and encoding.ids
            ]
            tokens = np.fromiter(chain.from_iterable(ids), dtype)
            writer.add(tokens, np.fromiter(map(len, ids), np.int64, len(ids)))
    splits = {split: writer.close() for split, writer in writers.items()}
    entropy = unigram_entropy(writers["train"].counts, special.every)
    return {"dtype": dtype.name, "vocab_size": vocab_size, **splits, "unigram_entropy": entropy}


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
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    hashed = sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            hashed.update(chunk)
    return hashed.hexdigest()


def _in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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


def flush(file: Any) -> None:
    """Write a file through to the disk."""
    file.flush()
    os.fsync(file.fileno())
