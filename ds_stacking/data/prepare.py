"""Prepare data once: corpus -> tokenizer -> token files, kept in a cache folder that every rank of every run shares.

Any number of processes on any number of nodes may call `prepare` at the same time, before a process group exists: one
prepares under a file lock, the others wait and open what it made. A folder appears in the cache by one rename of a
complete one, so a killed process leaves nothing that is taken for finished.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ds_stacking.common.files import write_json
from ds_stacking.config import CorpusConfig
from ds_stacking.data.arrays import Damaged
from ds_stacking.data.build import remove
from ds_stacking.data.cache import cache_root, locked, unstopped
from ds_stacking.data.corpus import identify_source, iterate_documents
from ds_stacking.data.manifests import MANIFEST, SPLITS
from ds_stacking.data.mixture import is_mixture
from ds_stacking.data.names import named_path
from ds_stacking.data.prepared_data import PreparedData, open_cached, open_mixture, open_prepared
from ds_stacking.data.prepared_folder import TOKENIZER, is_prepared
from ds_stacking.data.token_file import write_token_files
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

_FORMAT = 1
"""Part of the cache key; to be raised when the same input no longer gives the same arrays."""


def prepare(source: str, tokenizer: str, config: CorpusConfig, *, log: Callable[[str], None]) -> PreparedData:
    """Return the prepared data of a source: those of a folder of prepare_data.py, else the cache's, made if need be.

    `tokenizer` is `train`, a folder or a hub name. The cache is `config.cache_dir`, else $DS_STACKING_CACHE, else
    ~/.cache/ds_stacking. Raises UserError for bad input, for a damaged folder and where a split is shorter than one
    block; RunFailed where the cache's disk takes no more. A damaged entry of the cache is made again.
    """
    if is_prepared(source):
        return open_prepared(named_path(source), tokenizer, config, log)
    if is_mixture(source):
        return open_mixture(named_path(source), tokenizer, config, log)
    loaded = None if tokenizer == "train" else load_tokenizer(tokenizer)
    identity = _identity(source, loaded, config)
    root = cache_root(config)
    folder = root / sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    if (data := _open_whole(folder, config)) is not None:
        return data
    with locked(root, folder.name, log):
        if (data := _open_whole(folder, config, log)) is None:
            with unstopped(root):
                _build(folder, source, loaded, config, identity, log)
    return data or open_cached(folder, config)


def _open_whole(
    folder: Path, config: CorpusConfig, log: Callable[[str], None] = lambda _: None
) -> PreparedData | None:
    """Open an entry of the cache; None where there is none, or a damaged one."""
    if not os.path.lexists(folder):
        return None
    try:
        return open_cached(folder, config)
    except Damaged as fault:
        log(f"{str(fault).partition('; ')[0]}; this entry of the cache is made again.")
        return None


def _identity(source: str, tokenizer: PreTrainedTokenizerBase | None, config: CorpusConfig) -> dict[str, Any]:
    """Return everything that determines the prepared arrays, as JSON values."""
    return {
        "format": _FORMAT,
        "source": identify_source(source, config),
        "eval_percent": float(config.eval_percent),
        "tokenizer": tokenizer_identity(tokenizer, config),
    }


def _build(
    folder: Path,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    config: CorpusConfig,
    identity: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    """Prepare into a temporary folder beside `folder`, then rename it. The caller holds the lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed: only the lock's holder writes
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        _fill(unfinished, source, tokenizer, config, identity, log)
        remove(folder)  # a damaged one; who has mapped its files keeps them
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(
    folder: Path,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    config: CorpusConfig,
    identity: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    begin = time.monotonic()
    skipped: dict[str, str] = {}
    documents = iterate_documents(source, config, skipped)
    if tokenizer is None:
        log(f"Reading {source} and training a tokenizer of {config.vocab_size:,} entries.")
        sample = _take(documents, TRAINING_CHARACTERS)
        tokenizer = train_tokenizer(sample, config.vocab_size, config.lowercase)
        documents = chain(sample, documents)
    special, vocab_size = special_ids(tokenizer), count_vocabulary(tokenizer)
    log(f"Tokenising {source}.")
    arrays = write_token_files(folder, documents, text_encoder(tokenizer), special, vocab_size, config.eval_percent)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    digest = tokenizer_hash(tokenizer)
    write_json(folder / MANIFEST, {**arrays, "tokenizer_sha256": digest, "skipped": skipped, "identity": identity})
    tokens = sum(arrays[split]["tokens"] for split in SPLITS)
    log(f"Prepared {tokens:,} tokens in {time.monotonic() - begin:.0f} s: {arrays['train']['documents']:,} documents.")
    if skipped:
        name, fault = next(iter(skipped.items()))
        log(f"Left out {len(skipped)} files that are not readable text, such as {name}: {fault}.")


def _take(documents: Iterator[str], characters: int) -> list[str]:
    """Return documents from the front of an iterator until they hold so many characters."""
    taken: list[str] = []
    while characters > 0 and len(taken) < TRAINING_DOCUMENTS and (text := next(documents, None)) is not None:
        taken.append(text)
        characters -= len(text)
    return taken
