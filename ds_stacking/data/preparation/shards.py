"""Shards: the folders of token files that a prepared corpus consists of, each complete by itself and known by hash.

A shard appears by one rename, and depends on the source and on the shards before it alone, not on who made it when. It
holds, beside its token files, what the next shard must know of it: `digests.npy` [D] uint64 of its documents and, with
near duplicates, `signatures.npy` [D, 128] uint32; and `counts.npy` [vocab_size] int64, the frequencies of its train
tokens.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.common.files import write_json
from ds_stacking.data.arrays import Damaged, hash_inside, map_array
from ds_stacking.data.manifests import MANIFEST, SPLITS, ShardManifest, read_manifest, shard_name
from ds_stacking.data.preparation.duplicates import PERMUTATIONS
from ds_stacking.data.preparation.worker import Tokenised
from ds_stacking.data.token_file import SplitWriter, TokenFile, hashes, write_array

_EXAMPLES = 3


class ShardWriter:
    """Writes one shard into a hidden folder, which `close` renames."""

    def __init__(self, root: Path, number: int, dtype: np.dtype, vocab_size: int, sentences: bool) -> None:
        self.folder = root / shard_name(number)
        self._unfinished = root / f".{self.folder.name}"
        shutil.rmtree(self._unfinished, ignore_errors=True)  # of a run that was killed
        self._unfinished.mkdir(parents=True)
        self._dtype, self._vocab_size = dtype, vocab_size
        self._writers = {split: SplitWriter(self._unfinished, split, dtype, vocab_size, sentences) for split in SPLITS}
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
            "dtype": self._dtype.name,
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


def find_fault(folder: Path, number: int, vocab_size: int) -> str | None:
    """Read a shard of a prepared folder to its end; return what is wrong with it, None where nothing is.

    Every byte is compared with its hash, and what the arrays hold is looked at: hashes tell what was written, not that
    it was written by this code.
    """
    name = shard_name(number)
    try:
        manifest = read_manifest(folder / name, ShardManifest, inside=folder)
        if manifest["vocab_size"] != vocab_size:
            return f"{name}/{MANIFEST} tells of another vocabulary"
        expected = {f"{kind}.npy": digest for kind, digest in manifest["sha256"].items()}
        for split in SPLITS:
            expected |= hashes(split, manifest)
        for file, digest in expected.items():
            if hash_inside(folder, f"{name}/{file}") != digest:
                return f"{name}/{file} is damaged"
        for split in SPLITS:
            TokenFile.open(folder / name, split, manifest, inside=folder, whole=True)
        open_others(folder, name, manifest)
    except Damaged as error:
        return str(error).partition("; ")[0]
    return None


def open_others(folder: Path, name: str, manifest: ShardManifest) -> dict[str, np.ndarray]:
    """What a shard holds beside its splits: digests, counts and, where there are any, signatures. Raises Damaged."""
    documents = sum(manifest[split]["documents"] for split in SPLITS)
    kinds: dict[str, tuple[Any, int, int]] = {
        "digests": (np.uint64, 0, documents),
        "counts": (np.int64, 0, manifest["vocab_size"]),
    }
    if "signatures" in manifest["sha256"]:
        kinds["signatures"] = (np.uint32, PERMUTATIONS, documents)
    arrays = {}
    for kind, (dtype, columns, length) in kinds.items():
        arrays[kind] = map_array(folder, f"{name}/{kind}.npy", dtype, columns)
        if len(arrays[kind]) != length:
            raise Damaged(
                f"{folder / name}/{kind}.npy has {len(arrays[kind]):,} rows instead of {length:,}; make it again."
            )
    return arrays
