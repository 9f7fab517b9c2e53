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
from ds_stacking.data.cache import cache_root, locked
from ds_stacking.data.corpus import identify_source, iterate_documents
from ds_stacking.data.mixture import is_mixture
from ds_stacking.data.prepared_data import PreparedData, open_cached, open_mixture, open_prepared
from ds_stacking.data.prepared_folder import TOKENIZER, is_prepared
from ds_stacking.data.token_file import MANIFEST, SPLITS, write_token_files
from ds_stacking.data.tokenizer import (
    TRAINING_CHARACTERS,
    count_vocabulary,
    load_tokenizer,
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
    ~/.cache/ds_stacking. Raises UserError for bad input and where a split is shorter than one block.
    """
    if is_prepared(source):
        return open_prepared(Path(source).expanduser(), tokenizer, config, log)
    if is_mixture(source):
        return open_mixture(Path(source).expanduser(), tokenizer, config, log)
    loaded = None if tokenizer == "train" else load_tokenizer(tokenizer)
    identity = _identity(source, loaded, config)
    root = cache_root(config)
    folder = root / sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    if not _is_finished(folder):
        with locked(root, folder.name, log):
            if not _is_finished(folder):
                _build(folder, source, loaded, config, identity, log)
    return open_cached(folder, config)


def _identity(source: str, tokenizer: PreTrainedTokenizerBase | None, config: CorpusConfig) -> dict[str, Any]:
    """Return everything that determines the prepared arrays, as JSON values."""
    return {
        "format": _FORMAT,
        "source": identify_source(source, config),
        "eval_percent": float(config.eval_percent),
        "tokenizer": tokenizer_identity(tokenizer, config),
    }


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


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
    tokenizer.save_pretrained(str(folder / TOKENIZER))
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
    while characters > 0 and (text := next(documents, None)) is not None:
        taken.append(text)
        characters -= len(text)
    return taken
