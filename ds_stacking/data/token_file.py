"""Token files: a corpus tokenised once into one flat memory-mapped array per split.

A folder holds, for the splits `train` and `eval`, `<split>.bin` (the token ids of all documents, each followed by
[SEP], as uint16, or uint32 for vocabularies above 65,536) and `<split>_offsets.npy` (int64, where each document
begins, and the length), and `manifest.json`, which is written last.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ds_stacking.config import UserError
from ds_stacking.data.tokenizer import SpecialIds

SPLITS = ("train", "eval")
MANIFEST = "manifest.json"
_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One split of a tokenised corpus."""

    tokens: np.ndarray
    """Token ids of all documents, [N] uint16 or uint32, memory-mapped."""
    offsets: np.ndarray
    """Where each document begins in `tokens`, then N: [documents + 1] int64, memory-mapped."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def open(cls, folder: Path, split: str, manifest: dict[str, Any]) -> TokenFile:
        """Map one split of a folder; UserError if its file has not the size that the manifest states."""
        path, dtype, count = folder / f"{split}.bin", np.dtype(manifest["dtype"]), manifest[split]["tokens"]
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise UserError(f"The prepared data in {folder} are damaged; delete that folder and start again.")
        tokens = np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
        return cls(tokens=tokens, offsets=np.load(folder / f"{split}_offsets.npy", mmap_mode="r"))


def write_token_files(
    folder: Path,
    documents: Iterable[str],
    encoder: Tokenizer,
    special: SpecialIds,
    vocab_size: int,
    eval_percent: float,
) -> dict[str, Any]:
    """Tokenise documents into `folder`, batches in parallel on all cores; return the manifest's part on the arrays."""
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    writers = {split: _SplitWriter(folder, split, dtype, vocab_size, special.sep) for split in SPLITS}
    for texts in _in_batches(documents):
        encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        held_out = [is_held_out(text, eval_percent) for text in texts]
        for split, writer in writers.items():
            writer.add(
                [encoding.ids for encoding, out in zip(encodings, held_out, strict=True) if out == (split == "eval")]
            )
    splits = {split: writer.close() for split, writer in writers.items()}
    entropy = unigram_entropy(writers["train"].counts, special.every)
    return {"dtype": dtype.name, "vocab_size": vocab_size, **splits, "unigram_entropy": entropy}


def is_held_out(text: str, eval_percent: float) -> bool:
    """Whether a document is for evaluation: decided by its text alone, so a growing corpus never moves one."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_percent / 100 * 2**64


def unigram_entropy(counts: np.ndarray, special: tuple[int, ...]) -> float:
    """Return the entropy in nats of the frequencies of ordinary tokens, `counts` [vocab_size].

    It is the loss of the best guess that looks at no context, so a model must fall below it.
    """
    counts = counts.astype(np.float64)
    counts[list(special)] = 0
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


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


class _SplitWriter:
    """Appends documents to one split and counts what it wrote."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, vocab_size: int, sep: int) -> None:
        self._path = folder / f"{split}.bin"
        self._offsets_path = folder / f"{split}_offsets.npy"
        self._file = self._path.open("wb")
        self._hash = sha256()
        self._dtype, self._sep = dtype, sep
        self._lengths = array("q")
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, documents: list[list[int]]) -> None:
        for ids in filter(None, documents):
            self._lengths.append(len(ids) + 1)
            ids.append(self._sep)
        tokens = np.fromiter(chain.from_iterable(documents), self._dtype)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._hash.update(tokens.data)
        self._file.write(tokens.data)

    def close(self) -> dict[str, Any]:
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(np.frombuffer(self._lengths, np.int64), out=offsets[1:])
        with self._offsets_path.open("wb") as file:
            np.save(file, offsets)
            _flush(file)
        _flush(self._file)
        self._file.close()
        return {
            "documents": len(self._lengths),
            "tokens": int(offsets[-1]),
            "sha256": self._hash.hexdigest(),
            "offsets_sha256": sha256(offsets.data).hexdigest(),
        }


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
