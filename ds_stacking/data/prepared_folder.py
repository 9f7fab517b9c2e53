"""Prepared folders, opened and verified: what prepare_data.py makes, and each entry of the cache.

```
manifest.json       counts, hashes, source; written last
card.md             what a person wants to know of the data; lengths.png its figure
tokenizer/          Hugging Face folder
shard-<n>/          token files, and what the next shard must know of this one (preparation/shards.py)
preparation.json    what the folder was begun with
```
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError
from ds_stacking.common.own_files import refuse_links
from ds_stacking.data.manifests import (
    BEGUN,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Damaged,
    FolderManifest,
    ShardManifest,
    read_manifest,
    read_shards,
    shard_name,
)
from ds_stacking.data.names import named_path
from ds_stacking.data.preparation.duplicates import PERMUTATIONS
from ds_stacking.data.token_file import Split, TokenFile, hash_inside, hashes, map_array
from ds_stacking.data.tokenizer import count_vocabulary, load_tokenizer, tokenizer_hash


def is_prepared(source: str) -> bool:
    """Whether a data source is a prepared folder, finished or not."""
    return os.path.isfile(named_path(source) / BEGUN)  # False for a name too long, too


def open_folder(folder: Path) -> tuple[FolderManifest, dict[str, Split]]:
    """Return the manifest and the splits of a prepared folder; links below it are not followed.

    Raises Damaged if it is unfinished, or if manifests, sizes or what the arrays hold do not fit.
    """
    if not os.path.lexists(folder / MANIFEST):
        raise Damaged(f"{folder} is not finished; run the same prepare_data.py command again.")
    manifest = read_manifest(folder, FolderManifest)
    return manifest, open_splits(folder, read_shards(folder, manifest))


def verify_folder(folder: Path, log: Callable[[str], None]) -> FolderManifest:
    """Compare every byte of a finished folder with its hash; return its manifest. Raises UserError."""
    manifest, splits = open_folder(folder)
    for number in range(len(manifest["shards"])):
        if fault := find_fault(folder, number, manifest["vocab_size"]):
            raise Damaged(
                f"{folder}: {fault}; copy the folder again, or run the prepare_data.py command that made it, "
                f"which makes damaged shards again."
            )
    for name in SPLITS:
        if manifest[name].get("tokens_sha256") not in (None, splits[name].digest()):
            raise Damaged(f"{folder / MANIFEST} is of other data than its shards hold; copy the folder again.")
    tokenizer = own_tokenizer(folder, manifest["vocab_size"])
    if tokenizer_hash(tokenizer) != manifest["tokenizer_sha256"]:
        raise Damaged(
            f"{folder / TOKENIZER} is another tokenizer than the data were made with, or read by another version of "
            f"tokenizers; copy the folder again."
        )
    log(f"{folder}: the tokenizer and every byte of {len(manifest['shards'])} shards are what was written.")
    return manifest


def own_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer that a prepared folder holds. Raises Damaged where it is not that of its data."""
    try:
        refuse_links(folder, (TOKENIZER,))
        tokenizer = load_tokenizer(str(folder / TOKENIZER))
    except UserError as error:
        raise Damaged(str(error)) from None
    if count_vocabulary(tokenizer) != vocab_size:
        raise Damaged(
            f"{folder / TOKENIZER} has {count_vocabulary(tokenizer):,} entries, the data {vocab_size:,}; copy the "
            f"folder again, or prepare the data anew."
        )
    return tokenizer


def open_splits(folder: Path, shards: dict[str, ShardManifest]) -> dict[str, Split]:
    """The splits of a folder's shards, given the manifest of each. Raises Damaged."""
    return {
        split: Split(
            files=[TokenFile.open(folder / name, split, facts, inside=folder) for name, facts in shards.items()]
        )
        for split in SPLITS
    }


def token_counts(folder: Path, shards: dict[str, ShardManifest]) -> np.ndarray:
    """Return how often each token stands in the training split, [vocab_size] int64."""
    return np.sum([open_others(folder, name, manifest)["counts"] for name, manifest in shards.items()], axis=0)


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
