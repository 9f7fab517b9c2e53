"""Prepared folders: a corpus prepared once by `launchers/prepare_data.py`, for any number of runs and machines.

```
manifest.json       counts, hashes, source; written last
card.md             what a person wants to know of the data; lengths.png its figure
tokenizer/          Hugging Face folder
shard-<n>/          token files (shards.py)
preparation.json    what the folder was begun with
```
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError, require
from ds_stacking.common.files import write_json
from ds_stacking.common.own_files import refuse_links
from ds_stacking.data.arrays import Damaged
from ds_stacking.data.manifests import (
    MANIFEST,
    SPLITS,
    FolderManifest,
    ShardManifest,
    read_manifest,
    read_shards,
    shard_name,
    sum_up,
)
from ds_stacking.data.names import named_path, printable
from ds_stacking.data.preparation import worker
from ds_stacking.data.preparation.build import Build, ahead, in_batches
from ds_stacking.data.preparation.card import write_card
from ds_stacking.data.preparation.claim import BEGUN, TOKENIZER, claimed, stopped
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.leaks import find_leak, refuse_leak
from ds_stacking.data.preparation.pool import count_workers, worker_pool
from ds_stacking.data.preparation.shards import find_fault, open_others
from ds_stacking.data.sources.corpus import identify_source, raw_documents
from ds_stacking.data.token_file import Split, TokenFile, token_type, unigram_entropy
from ds_stacking.data.tokenizer import (
    TRAINING_CHARACTERS,
    TRAINING_DOCUMENTS,
    count_vocabulary,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    text_encoder,
    tokenizer_hash,
    tokenizer_identity,
    train_tokenizer,
)

_MEND_LEAK = (
    "drop near duplicates (--near_duplicates 0.7, a new --output_dir), or raise --max_leak: the finished shards are "
    "kept"
)
_FORMAT = 1


def prepare_folder(config: PreparationConfig, log: Callable[[str], None]) -> Any:
    """Prepare `config.output_dir`, or go on where an earlier run was stopped; return its manifest.

    In a finished folder every byte is compared with its hash, and damaged shards are made again; with `config.verify`
    they are refused. Raises UserError for bad input, for a folder that was begun with other settings, and where
    held-out text stands in the training split; RunFailed for a full disk, a lost worker and Ctrl-C.
    """
    folder = named_path(config.output_dir)
    if config.verify:
        return verify_folder(folder, log)
    _refuse_own_output(config.data, folder)
    loaded = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    identity = _identity(config, loaded)
    with stopped(folder), claimed(folder, identity):
        begin = time.monotonic()
        tokenizer = _tokenizer(folder, config, loaded, log)
        build = Build(config=config, folder=folder, log=log, tokenizer=tokenizer)
        build.adopt_finished_shards()
        if os.path.lexists(folder / MANIFEST):
            try:
                manifest, _ = open_folder(folder)
                log(f"{folder} is finished; {len(build.shards)} shards have the bytes that were written.")
                return manifest
            except Damaged as fault:
                log(str(fault).partition("; ")[0] + "; what is missing is made again.")
                (folder / MANIFEST).unlink()
        if build.shards:
            log(f"{len(build.shards)} finished shards are kept; going on behind document {build.read:,}.")
        with worker_pool(config.workers, _worker_config(config, tokenizer)) as pool:
            build.run(pool, window=2 * count_workers(config.workers))
        return _finish(build, identity, time.monotonic() - begin)


def is_prepared(source: str) -> bool:
    """Whether a data source is a prepared folder, finished or not."""
    return os.path.isfile(named_path(source) / BEGUN)  # False for a name too long, too


def open_folder(folder: Path, *, whole: bool = False) -> tuple[FolderManifest, dict[str, Split]]:
    """Return the manifest and the splits of a prepared folder; links below it are not followed.

    Raises UserError if it is unfinished, Damaged if manifests, sizes or what the arrays hold do not fit; with `whole`
    all of the arrays is looked at.
    """
    if not os.path.lexists(folder / MANIFEST):
        raise UserError(f"{folder} is not finished; run the same prepare_data.py command again.")
    manifest = read_manifest(folder, FolderManifest)
    return manifest, _splits(folder, read_shards(folder, manifest), whole)


def verify_folder(folder: Path, log: Callable[[str], None]) -> FolderManifest:
    """Compare every byte of a finished folder with its hash; return its manifest. Raises UserError."""
    manifest, _ = open_folder(folder)
    for number in range(len(manifest["shards"])):
        if fault := find_fault(folder, number, manifest["vocab_size"]):
            raise Damaged(
                f"{folder}: {fault}; copy the folder again, or run the prepare_data.py command that made it, "
                f"which makes damaged shards again."
            )
    tokenizer = own_tokenizer(folder, manifest["vocab_size"])
    if tokenizer_hash(tokenizer) != manifest["tokenizer_sha256"]:
        raise Damaged(
            f"{folder / TOKENIZER} is another tokenizer than the data were made with, or read by another version of "
            f"tokenizers; copy the folder again."
        )
    log(f"{folder}: the tokenizer and every byte of {len(manifest['shards'])} shards are what was written.")
    return manifest


def own_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer that a prepared folder or cache entry holds. Raises Damaged where it is not that of its data."""
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


def _splits(folder: Path, shards: dict[str, ShardManifest], whole: bool = False) -> dict[str, Split]:
    """The splits of a folder's shards, given the manifest of each."""
    return {
        split: Split(
            files=[
                TokenFile.open(folder / name, split, facts, inside=folder, whole=whole)
                for name, facts in shards.items()
            ]
        )
        for split in SPLITS
    }


def token_counts(folder: Path, shards: dict[str, ShardManifest]) -> np.ndarray:
    """Return how often each token stands in the training split, [vocab_size] int64."""
    return np.sum([open_others(folder, name, manifest)["counts"] for name, manifest in shards.items()], axis=0)


def _refuse_own_output(source: str, folder: Path) -> None:
    """Raise UserError where the prepared folder would lie in the source, and be read as text the next time."""
    path = named_path(source)
    if source != "docs" and path.is_dir():
        require(
            not folder.resolve().is_relative_to(path.resolve()),
            f"output_dir {printable(folder)} lies in the data source {printable(source)}, which is searched for text; "
            f"choose a folder elsewhere.",
        )


def _identity(config: PreparationConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Everything that determines the shards, as JSON values."""
    identity = {
        "format": _FORMAT,
        "source": identify_source(config.data, config.corpus),
        "tokenizer": tokenizer_identity(tokenizer, config.corpus),
        "eval_percent": config.corpus.eval_percent,
        "sentences": config.sentences,
        "near_duplicates": config.near_duplicates,
        "shard_tokens": config.shard_tokens,
    }
    return json.loads(json.dumps(identity))


def _tokenizer(
    folder: Path, config: PreparationConfig, loaded: PreTrainedTokenizerBase | None, log: Callable[[str], None]
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, put there at the first time."""
    final, unfinished = folder / TOKENIZER, folder / f".{TOKENIZER}"
    if not final.is_dir():
        if loaded is None:
            log(f"Training a tokenizer of {config.corpus.vocab_size:,} entries on the beginning of {config.data}.")
            texts = _training_texts(config)
            loaded = train_tokenizer(texts, config.corpus.vocab_size, config.corpus.lowercase)
        shutil.rmtree(unfinished, ignore_errors=True)
        save_tokenizer(loaded, unfinished)
        os.rename(unfinished, final)
    return load_tokenizer(str(final))


def _training_texts(config: PreparationConfig) -> list[str]:
    texts: list[str] = []
    characters = 0
    with worker_pool(config.workers, None) as pool:
        source = in_batches(raw_documents(config.data, config.corpus))
        for _, cleaned in ahead(pool, worker.clean, source, window=2 * count_workers(config.workers)):
            texts += cleaned
            characters += sum(map(len, cleaned))
            if characters >= TRAINING_CHARACTERS or len(texts) >= TRAINING_DOCUMENTS:
                break
    return texts


def _worker_config(config: PreparationConfig, tokenizer: PreTrainedTokenizerBase) -> worker.WorkerConfig:
    return worker_config(
        tokenizer,
        config.corpus.eval_percent,
        sentences=config.sentences,
        near_duplicates=bool(config.near_duplicates),
    )


def worker_config(
    tokenizer: PreTrainedTokenizerBase, eval_percent: float, *, sentences: bool = False, near_duplicates: bool = False
) -> worker.WorkerConfig:
    """What decides a document's tokens and its side."""
    return worker.WorkerConfig(
        tokenizer=text_encoder(tokenizer).to_str(),
        sep=special_ids(tokenizer).sep,
        dtype=token_type(count_vocabulary(tokenizer)).name,
        eval_percent=eval_percent,
        sentences=sentences,
        near_duplicates=near_duplicates,
    )


def _finish(build: Build, identity: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Sum up, check that nothing held out was trained on, write the card and at last the manifest."""
    folder, config = build.folder, build.config
    shards = {shard_name(number): facts for number, facts in enumerate(build.shards)}
    splits, names = _splits(folder, shards), list(shards)
    special = special_ids(build.tokenizer)
    leak = find_leak(splits["train"], splits["eval"], special.sep)
    refuse_leak(leak.percent, config.max_leak, name="max_leak", mend=_MEND_LEAK)
    totals: Counter[str] = Counter()
    for shard in build.shards:
        totals.update(shard["totals"])
    manifest: Any = {
        "dtype": build.shards[0]["dtype"],
        "vocab_size": count_vocabulary(build.tokenizer),
        "tokenizer_sha256": tokenizer_hash(build.tokenizer),
        **{split: sum_up(split, build.shards) for split in SPLITS},
        "unigram_entropy": unigram_entropy(token_counts(folder, shards), special.every),
        "read": build.shards[-1]["read"],
        "totals": dict(totals),
        "leak": asdict(leak),
        "max_leak": config.max_leak,
        "skipped": build.skipped,
        "shards": names,
        "tokenizer": printable(config.tokenizer),
        "identity": identity,
    }
    write_card(folder, manifest, splits, [text for shard in build.shards for text in shard["examples"]])
    write_json(folder / MANIFEST, manifest, inside=folder)
    tokens = sum(manifest[split]["tokens"] for split in SPLITS)
    build.log(
        f"Prepared {tokens:,} tokens in {seconds:.0f} s: {len(names)} shards in {folder}, read {folder}/card.md."
    )
    return manifest
