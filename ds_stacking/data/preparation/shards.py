"""Shards: the folders of token files that a prepared corpus consists of, each complete by itself and known by hash.

A shard appears by one rename, and depends on the source and on the shards before it alone, not on who made it when. It
holds, beside its token files, what the next shard must know of it: `digests.npy` [D] uint64 of its documents and, with
near duplicates, `signatures.npy` [D, 128] uint32; and `counts.npy` [vocab_size] int64, the frequencies of its train
tokens.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.common.files import write_json
from ds_stacking.data.manifests import MANIFEST, SPLITS, ShardManifest, shard_name
from ds_stacking.data.preparation.worker import Tokenised
from ds_stacking.data.token_file import hash_inside, token_type

_EXAMPLES = 3


class ShardWriter:
    """Writes one shard into a hidden folder, which `close` renames."""

    def __init__(self, root: Path, number: int, *, vocab_size: int, sentences: bool) -> None:
        self.folder = root / shard_name(number)
        self._unfinished = root / f".{self.folder.name}"
        shutil.rmtree(self._unfinished, ignore_errors=True)  # of a run that was killed
        self._unfinished.mkdir(parents=True)
        self._vocab_size = vocab_size
        self._writers = {split: SplitWriter(self._unfinished, split, vocab_size, sentences) for split in SPLITS}
        self._digests: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._examples: list[str] = []
        self.totals: Counter[str] = Counter()

    @property
    def tokens(self) -> int:
        """Tokens so far, of both splits."""
        return sum(writer.size for writer in self._writers.values())

    def add(self, batch: Tokenised, keep: np.ndarray) -> None:
        """Append the documents of a batch that `keep` [D] bool names."""
        for split, writer in self._writers.items():
            wanted = keep & (batch.held_out == (split == "eval"))
            of_split = np.repeat(wanted, batch.lengths)  # [N]
            starts = None
            if batch.sentences is not None:
                places = np.cumsum(of_split) - 1  # where a token goes
                starts = places[batch.sentences[of_split[batch.sentences]]]
            writer.add(batch.tokens[of_split], batch.lengths[wanted], starts)
        self.totals["words"] += int(batch.words[keep].sum())
        self._digests.append(batch.digests[keep])
        if batch.signatures is not None:
            self._signatures.append(batch.signatures[keep])
        if keep.size and keep[0] and len(self._examples) < _EXAMPLES:
            self._examples.append(batch.example)

    def close(self, read: int) -> ShardManifest:
        """Finish the shard after the first `read` documents of the source; return its manifest."""
        splits = {split: writer.close() for split, writer in self._writers.items()}
        arrays = {"digests": np.concatenate([*self._digests, np.zeros(0, np.uint64)])}
        arrays["counts"] = self._writers["train"].counts
        if self._signatures:
            arrays["signatures"] = np.concatenate(self._signatures)
        manifest: Any = {
            "dtype": token_type(self._vocab_size).name,
            "vocab_size": self._vocab_size,
            **splits,
            "read": read,
            "totals": dict(self.totals),
            "sha256": {name: write_array(self._unfinished / f"{name}.npy", a) for name, a in arrays.items()},
            "examples": self._examples,
        }
        write_json(self._unfinished / MANIFEST, manifest)
        os.rename(self._unfinished, self.folder)
        return manifest

    def discard(self) -> None:
        """Leave no trace of a shard that got no document, or that cannot be finished."""
        for writer in self._writers.values():
            writer.abandon()
        shutil.rmtree(self._unfinished, ignore_errors=True)


class SplitWriter:
    """Appends documents to one split of a folder and counts what it wrote."""

    def __init__(self, folder: Path, split: str, vocab_size: int, sentences: bool = False) -> None:
        self._folder, self._split = folder, split
        self._file = (folder / f"{split}.bin").open("wb")
        self._hash = sha256()
        self._lengths = array("q")
        self._sentences = array("I") if sentences else None
        self._dtype = token_type(vocab_size)
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


def write_array(path: Path, values: np.ndarray) -> str:
    """Write an array as NumPy's .npy through to the disk; return the sha256 of the file."""
    with path.open("wb") as file:
        np.save(file, values)
        flush(file)
    return hash_inside(path.parent, path.name)
