"""Shards: the folders of token files that a prepared corpus consists of, each complete by itself and known by hash.

A shard appears by one rename, and depends on the source and on the shards before it alone, not on who made it when. It
holds, beside its token files, what the next shard must know of it: `digests.npy` [D] uint64 of its documents and, with
near duplicates, `signatures.npy` [D, 128] uint32; and `counts.npy` [vocab_size] int64, the frequencies of its train
tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.common.files import write_json
from ds_stacking.data.token_file import MANIFEST, SPLITS, SplitWriter, file_sha256, write_array
from ds_stacking.data.worker import Tokenised

_EXAMPLES = 3


class ShardWriter:
    """Writes one shard into a hidden folder, which `close` renames."""

    def __init__(self, root: Path, number: int, dtype: np.dtype, vocab_size: int, sentences: bool) -> None:
        self.folder = root / f"shard-{number:05d}"
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

    def close(self, read: int) -> dict[str, Any]:
        """Finish the shard after the first `read` documents of the source; return its manifest."""
        splits = {split: writer.close() for split, writer in self._writers.items()}
        arrays = {"digests": np.concatenate([*self._digests, np.zeros(0, np.uint64)])}
        arrays["counts"] = self._writers["train"].counts
        if self._signatures:
            arrays["signatures"] = np.concatenate(self._signatures)
        manifest = {
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
        """Leave no trace of a shard that got no document."""
        shutil.rmtree(self._unfinished)


def find_fault(folder: Path) -> str | None:
    """Read a shard to its end; return the file that is not what was written, None where all are."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {f"{name}.npy": digest for name, digest in manifest["sha256"].items()}
        for split in SPLITS:
            expected[f"{split}.bin"] = manifest[split]["sha256"]
            for kind in ("offsets", "sentences"):
                if (digest := manifest[split].get(f"{kind}_sha256")) is not None:
                    expected[f"{split}_{kind}.npy"] = digest
    except (OSError, ValueError, KeyError, TypeError):
        return MANIFEST
    for name, digest in expected.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            return name
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a shard or a prepared folder says of itself."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
