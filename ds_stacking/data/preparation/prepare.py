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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.config import CorpusConfig
from ds_stacking.data.arrays import Damaged
from ds_stacking.data.manifests import COUNTS, MANIFEST, SPLITS, CacheManifest, read_manifest
from ds_stacking.data.mixture import is_mixture
from ds_stacking.data.names import named_path, printable
from ds_stacking.data.preparation import worker
from ds_stacking.data.preparation.build import in_batches, remove
from ds_stacking.data.preparation.cache import cache_root, locked, unstopped
from ds_stacking.data.preparation.duplicates import DigestSet
from ds_stacking.data.preparation.folder import TOKENIZER, is_prepared, worker_config
from ds_stacking.data.preparation.leaks import find_leak
from ds_stacking.data.prepared_data import (
    PreparedData,
    fingerprint,
    open_cached,
    open_mixture,
    open_prepared,
    say_decided,
)
from ds_stacking.data.sources.corpus import RawDocument, identify_source, raw_documents
from ds_stacking.data.token_file import Split, TokenFile, split_writers, token_type, unigram_entropy, write_array
from ds_stacking.data.tokenizer import (
    TRAINING_CHARACTERS,
    TRAINING_DOCUMENTS,
    count_vocabulary,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    tokenizer_identity,
    train_tokenizer,
)

_KEY = 24
"""Hexadecimal digits that name an entry of the cache."""
_FORMAT = 2
"""Part of the cache key; to be raised when the same input no longer gives the same arrays."""


def prepare(source: str, tokenizer: str, config: CorpusConfig, *, log: Callable[[str], None]) -> PreparedData:
    """Return the prepared data of a source: those of a folder of prepare_data.py, else the cache's, made if need be.

    `tokenizer` is `train`, a folder or a hub name. The cache is `config.cache_dir`, else $DS_STACKING_CACHE, else
    ~/.cache/ds_stacking. With `config.fingerprint` they must be the data of that fingerprint: those are taken from the
    cache, whatever made them, without a look at the source. A damaged entry of the cache is made again. Raises
    UserError for bad input, for a damaged folder, where a split is shorter than one block, where too much of what is
    held out stands in the training split and where the fingerprint is another; RunFailed where the cache's disk takes
    no more.
    """
    if is_prepared(source):
        data = open_prepared(named_path(source), tokenizer, config, log)
    elif is_mixture(source):
        data = open_mixture(named_path(source), tokenizer, config, log)
    else:
        data = _pinned(config, log) or _cached(source, tokenizer, config, log)
    if config.fingerprint not in (None, data.fingerprint):
        raise UserError(
            f"The data of {printable(source)} have the fingerprint {data.fingerprint}, not corpus.fingerprint "
            f"({config.fingerprint}): the source, the tokenizer or what reads them has changed since; give the cache "
            f"that holds those data (--corpus.cache_dir), or leave out corpus.fingerprint."
        )
    return data


def _pinned(config: CorpusConfig, log: Callable[[str], None]) -> PreparedData | None:
    """The entry of the cache that has `config.fingerprint`; None where none is asked for, or none is whole."""
    root = cache_root(config)
    for folder in sorted(root.glob("[0-9a-f]" * _KEY)) if config.fingerprint else ():
        with suppress(Damaged):
            manifest = read_manifest(folder, CacheManifest, inside=root)
            if fingerprint(manifest) == config.fingerprint and (data := _open_whole(folder, config, log)) is not None:
                say_decided(folder, manifest["identity"], config, log)
                return data
    return None


def _cached(source: str, tokenizer: str, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData:
    """The entry of the cache that a source and the settings decide, made if need be."""
    loaded = None if tokenizer == "train" else load_tokenizer(tokenizer)
    identity = _identity(source, loaded, config)
    root = cache_root(config)
    folder = root / sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:_KEY]
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
    batches = in_batches(raw_documents(source, config, skipped))
    if tokenizer is None:
        log(f"Reading {source} and training a tokenizer of {config.vocab_size:,} entries.")
        sample = _take(batches)
        texts = [document.text for batch in sample for document in batch]
        tokenizer = train_tokenizer(texts, config.vocab_size, config.lowercase)
        batches = chain(sample, batches)
    log(f"Tokenising {source}.")
    arrays = write_token_files(folder, batches, tokenizer, config.eval_percent)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    digest = tokenizer_hash(tokenizer)
    write_json(folder / MANIFEST, {**arrays, "tokenizer_sha256": digest, "skipped": skipped, "identity": identity})
    tokens = sum(arrays[split]["tokens"] for split in SPLITS)
    equal = arrays["totals"]["equal"]
    log(
        f"Prepared {tokens:,} tokens in {time.monotonic() - begin:.0f} s: {arrays['train']['documents']:,} documents"
        f"{f', {equal:,} that were there before left out' if equal else ''}."
    )
    if skipped:
        name, fault = next(iter(skipped.items()))
        log(f"Left out {len(skipped)} files that are not readable text, such as {name}: {fault}.")


def _take(batches: Iterator[list[RawDocument]]) -> list[list[RawDocument]]:
    """Return batches from the front, cleaned, until they hold what a tokenizer is trained on."""
    taken: list[list[RawDocument]] = []
    characters = documents = 0
    while characters < TRAINING_CHARACTERS and documents < TRAINING_DOCUMENTS:
        if (batch := next(batches, None)) is None:
            break
        taken.append([RawDocument(text) for text in worker.clean(batch)])
        characters += sum(len(document.text) for document in taken[-1])
        documents += len(taken[-1])
    return taken


def write_token_files(
    folder: Path, batches: Iterable[list[RawDocument]], tokenizer: PreTrainedTokenizerBase, eval_percent: float
) -> dict[str, Any]:
    """Clean and tokenise batches of documents into `folder`, those that were there before left out, as
    `prepare_folder` does; return the manifest's part on the arrays."""
    vocab_size, special = count_vocabulary(tokenizer), special_ids(tokenizer)
    dtype, seen = token_type(vocab_size), DigestSet()
    totals = Counter({"equal": 0, "words": 0})
    worker.load(worker_config(tokenizer, eval_percent))
    with split_writers(folder, dtype, vocab_size) as writers:
        for batch in batches:
            result = worker.tokenise(batch)
            is_new = seen.add(result.digests)
            for split, writer in writers.items():
                wanted = is_new & (result.held_out == (split == "eval"))
                writer.add(result.tokens[wanted.repeat(result.lengths)], result.lengths[wanted])
            totals.update(equal=int((~is_new).sum()), words=int(result.words[is_new].sum()))
        arrays: dict[str, Any] = {"dtype": dtype.name, "vocab_size": vocab_size}
        arrays |= {split: writer.close() for split, writer in writers.items()}
    counts = writers["train"].counts
    train, held_out = (Split(files=[TokenFile.open(folder, split, arrays)]) for split in SPLITS)  # type: ignore[arg-type]
    return arrays | {
        "unigram_entropy": unigram_entropy(counts, special.every),
        "counts_sha256": write_array(folder / COUNTS, counts),
        "totals": dict(totals),
        "leak": asdict(find_leak(train, held_out, special.sep)),
    }
