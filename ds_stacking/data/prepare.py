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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from ds_stacking.config import CorpusConfig, UserError
from ds_stacking.data.corpus import identify_source, iterate_documents
from ds_stacking.data.prepared_folder import TOKENIZER, is_prepared, open_folder
from ds_stacking.data.token_file import MANIFEST, SPLITS, Split, TokenFile, write_json, write_token_files
from ds_stacking.data.tokenizer import (
    TRAINING_CHARACTERS,
    SpecialIds,
    continuing_tokens,
    count_vocabulary,
    load_tokenizer,
    special_ids,
    text_encoder,
    tokenizer_hash,
    train_tokenizer,
)

_FORMAT = 1
"""Part of the cache key; to be raised when the same input no longer gives the same arrays."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A tokenised corpus and its tokenizer."""

    folder: Path
    """The cache folder that holds all of it."""
    tokenizer_dir: Path
    """Hugging Face folder of the tokenizer, for AutoTokenizer."""
    vocab_size: int
    """Rows that the embedding needs."""
    special: SpecialIds
    """Special token ids."""
    train: Split
    """Training split."""
    eval: Split
    """Held-out split."""
    unigram_entropy: float
    """Entropy in nats of the ordinary train tokens: the loss of guessing by frequency alone."""
    continuing: np.ndarray | None
    """Which tokens go on with a word, [vocab_size] bool; None where single tokens are masked."""
    fingerprint: str
    """Digest of the arrays and the tokenizer: equal on two machines exactly if they hold the same data."""
    manifest: dict[str, Any]
    """What manifest.json holds: counts, digests, the source and the files that were left out."""


def prepare(source: str, tokenizer: str, config: CorpusConfig, *, log: Callable[[str], None]) -> PreparedData:
    """Return the prepared data of a source: those of a folder of prepare_data.py, else the cache's, made if need be.

    `tokenizer` is `train`, a folder or a hub name. The cache is `config.cache_dir`, else $DS_STACKING_CACHE, else
    ~/.cache/ds_stacking. Raises UserError for bad input and where a split is shorter than one block.
    """
    if is_prepared(source):
        return _open_prepared(Path(source).expanduser(), tokenizer, config, log)
    loaded = None if tokenizer == "train" else load_tokenizer(tokenizer)
    identity = _identity(source, loaded, config)
    root = _cache_root(config)
    folder = root / sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    if not _is_finished(folder):
        with _lock(root, folder.name, log):
            if not _is_finished(folder):
                _build(folder, source, loaded, config, identity, log)
    return _open(folder, config)


def _cache_root(config: CorpusConfig) -> Path:
    chosen = config.cache_dir or os.environ.get("DS_STACKING_CACHE") or "~/.cache/ds_stacking"
    return Path(chosen).expanduser().resolve()


def _identity(source: str, tokenizer: PreTrainedTokenizerBase | None, config: CorpusConfig) -> dict[str, Any]:
    """Return everything that determines the prepared arrays, as JSON values."""
    if tokenizer is None:
        trained = {"vocab_size": config.vocab_size, "lowercase": config.lowercase, "by": tokenizers.__version__}
    return {
        "format": _FORMAT,
        "source": identify_source(source, config),
        "eval_percent": float(config.eval_percent),
        "tokenizer": trained if tokenizer is None else tokenizer_hash(tokenizer),
    }


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _lock(root: Path, key: str, log: Callable[[str], None]) -> AbstractContextManager:
    """Acquire the lock of one cache entry; the end of the `with` releases it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock")
        try:
            return lock.acquire(timeout=1)
        except Timeout:
            log("Waiting for another process that prepares the same data.")
            return lock.acquire()
    except OSError as error:
        raise UserError(
            f"The cache folder {root} cannot be written ({error.strerror}); "
            f"set corpus.cache_dir or $DS_STACKING_CACHE."
        ) from error


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


def _open(folder: Path, config: CorpusConfig) -> PreparedData:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    splits = {split: Split(files=[TokenFile.open(folder, split, manifest)]) for split in SPLITS}
    return _prepared(folder, manifest, splits, config)


def _open_prepared(folder: Path, tokenizer: str, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData:
    """Open a folder of prepare_data.py, which has decided the tokenizer and the split; say where it was otherwise."""
    manifest, splits = open_folder(folder)
    if tokenizer != "train" and tokenizer_hash(load_tokenizer(tokenizer)) != manifest["tokenizer_sha256"]:
        raise UserError(
            f"{folder} was tokenised with {manifest['tokenizer']!r}, not with {tokenizer!r}; "
            f"give --tokenizer train to take the folder's, or prepare the data anew."
        )
    identity = manifest["identity"]
    decided = {"eval_percent": identity["eval_percent"]}
    if isinstance(identity["tokenizer"], dict):
        decided |= {name: identity["tokenizer"][name] for name in ("vocab_size", "lowercase")}
    for name, value in decided.items():
        if getattr(config, name) != value:
            log(f"corpus.{name} is {value} in {folder}; the configuration's {getattr(config, name)} has no effect.")
    return _prepared(folder, manifest, splits, config)


def _prepared(folder: Path, manifest: dict[str, Any], splits: dict[str, Split], config: CorpusConfig) -> PreparedData:
    for split in SPLITS:
        _require_one_block(split, manifest[split]["tokens"], config)
    digests = [manifest["tokenizer_sha256"], *(manifest[split]["sha256"] for split in SPLITS)]
    tokenizer_dir = folder / TOKENIZER
    tokenizer = load_tokenizer(str(tokenizer_dir))
    return PreparedData(
        folder=folder,
        tokenizer_dir=tokenizer_dir,
        vocab_size=manifest["vocab_size"],
        special=special_ids(tokenizer),
        continuing=None if config.masking == "token" else continuing_tokens(tokenizer),
        train=splits["train"],
        eval=splits["eval"],
        unigram_entropy=manifest["unigram_entropy"],
        fingerprint=sha256("".join(digests).encode()).hexdigest()[:16],
        manifest=manifest,
    )


def _require_one_block(split: str, tokens: int, config: CorpusConfig) -> None:
    if tokens >= config.sequence_length:
        return
    mend = "raise" if split == "eval" else "lower"
    raise UserError(
        f"The {split} split has {tokens} tokens, fewer than one block of {config.sequence_length}; "
        f"give more documents, {mend} corpus.eval_percent ({config.eval_percent:g}) or shorten corpus.sequence_length."
    )
