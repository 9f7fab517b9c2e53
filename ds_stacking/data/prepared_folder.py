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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import is_leftover, write_json
from ds_stacking.data import worker
from ds_stacking.data.build import Build, ahead, in_batches
from ds_stacking.data.card import write_card
from ds_stacking.data.corpus import identify_source, raw_documents
from ds_stacking.data.leaks import Leak, find_leak
from ds_stacking.data.preparation_config import PreparationConfig
from ds_stacking.data.shards import read_manifest
from ds_stacking.data.token_file import MANIFEST, SPLITS, Split, TokenFile, token_type, unigram_entropy
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

BEGUN = "preparation.json"
TOKENIZER = "tokenizer"
_FORMAT = 1


def prepare_folder(config: PreparationConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """Prepare `config.output_dir`, or go on where an earlier run was stopped; return its manifest.

    In a finished folder every byte is compared with its hash, and damaged shards are made again. Raises UserError for
    bad input, for a folder that was begun with other settings, and where held-out text stands in the training split.
    """
    folder = Path(config.output_dir).expanduser()
    loaded = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    identity = _identity(config, loaded)
    with _claimed(folder, identity):
        begin = time.monotonic()
        tokenizer = _tokenizer(folder, config, loaded, log)
        build = Build(config=config, folder=folder, log=log, tokenizer=tokenizer)
        build.adopt_finished_shards()
        if (folder / MANIFEST).is_file():
            log(f"{folder} is finished; {len(build.shards)} shards have the bytes that were written.")
            return read_manifest(folder)
        if build.shards:
            log(f"{len(build.shards)} finished shards are kept; going on behind document {build.read:,}.")
        with _pool(config, _worker_config(config, tokenizer)) as pool:
            build.run(pool, window=2 * _workers(config))
        return _finish(build, identity, time.monotonic() - begin)


def is_prepared(source: str) -> bool:
    """Whether a data source is a prepared folder, finished or not."""
    return (Path(source).expanduser() / BEGUN).is_file()


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Split]]:
    """Return the manifest and the splits of a prepared folder; UserError if it is unfinished or damaged."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not finished; run the same prepare_data.py command again.")
    manifest = read_manifest(folder)
    return manifest, _splits(folder, {name: read_manifest(folder / name) for name in manifest["shards"]})


def _splits(folder: Path, shards: dict[str, dict[str, Any]]) -> dict[str, Split]:
    """The splits of a folder's shards, given the manifest of each."""
    return {
        split: Split(files=[TokenFile.open(folder / name, split, facts) for name, facts in shards.items()])
        for split in SPLITS
    }


def token_counts(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Return how often each token stands in the training split, [vocab_size] int64."""
    return np.sum([np.load(folder / name / "counts.npy") for name in manifest["shards"]], axis=0)


def _identity(config: PreparationConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Everything that determines the shards, as JSON values."""
    return {
        "format": _FORMAT,
        "source": identify_source(config.data, config.corpus),
        "tokenizer": tokenizer_identity(tokenizer, config.corpus),
        "eval_percent": config.corpus.eval_percent,
        "sentences": config.sentences,
        "near_duplicates": config.near_duplicates,
        "shard_tokens": config.shard_tokens,
    }


@contextmanager
def _claimed(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the folder's lock, after making sure that it is empty or was begun with the same settings."""
    identity = json.loads(json.dumps(identity))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process prepares {folder}; wait for it, or choose another --output_dir.") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir.") from error
    try:
        if (folder / BEGUN).is_file():
            begun = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
            if different := [name for name in identity if begun.get(name) != identity[name]]:
                raise UserError(
                    f"{folder} was begun with another {', '.join(different)}; "
                    f"give the same options and unchanged files, or choose another --output_dir."
                )
        elif any(path.name != ".lock" and not is_leftover(path) for path in folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose another --output_dir.")
        else:
            write_json(folder / BEGUN, identity)
        yield
    finally:
        lock.release()


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
        loaded.save_pretrained(str(unfinished))
        os.rename(unfinished, final)
    return load_tokenizer(str(final))


def _training_texts(config: PreparationConfig) -> list[str]:
    texts: list[str] = []
    characters = 0
    with _pool(config, None) as pool:
        source = in_batches(raw_documents(config.data, config.corpus))
        for _, cleaned in ahead(pool, worker.clean, source, window=2 * _workers(config)):
            texts += cleaned
            characters += sum(map(len, cleaned))
            if characters >= TRAINING_CHARACTERS:
                break
    return texts


def _workers(config: PreparationConfig) -> int:
    return config.workers or len(os.sched_getaffinity(0))


def _worker_config(config: PreparationConfig, tokenizer: PreTrainedTokenizerBase) -> worker.WorkerConfig:
    return worker.WorkerConfig(
        tokenizer=text_encoder(tokenizer).to_str(),
        sep=special_ids(tokenizer).sep,
        dtype=token_type(count_vocabulary(tokenizer)).name,
        eval_percent=config.corpus.eval_percent,
        sentences=config.sentences,
        near_duplicates=bool(config.near_duplicates),
    )


@contextmanager
def _pool(config: PreparationConfig, setting: worker.WorkerConfig | None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; a fresh interpreter each, since threads of a tokenizer do not survive a fork."""
    pool = ProcessPoolExecutor(
        _workers(config), mp_context=get_context("spawn"), initializer=worker.start, initargs=(setting,)
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker was killed, most likely for lack of memory. Finished shards are kept: run the same command "
            "again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(build: Build, identity: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Sum up, check that nothing held out was trained on, write the card and at last the manifest."""
    folder, config = build.folder, build.config
    shards = {f"shard-{number:05d}": facts for number, facts in enumerate(build.shards)}
    splits, names = _splits(folder, shards), list(shards)
    special = special_ids(build.tokenizer)
    leak = find_leak(splits["train"], splits["eval"], special.sep)
    _refuse_leak(leak, config)
    totals: Counter[str] = Counter()
    for shard in build.shards:
        totals.update(shard["totals"])
    manifest = {
        "dtype": build.shards[0]["dtype"],
        "vocab_size": count_vocabulary(build.tokenizer),
        "tokenizer_sha256": tokenizer_hash(build.tokenizer),
        **{split: _sum_up(split, build.shards) for split in SPLITS},
        "unigram_entropy": unigram_entropy(token_counts(folder, {"shards": names}), special.every),
        "read": build.shards[-1]["read"],
        "totals": dict(totals),
        "leak": asdict(leak),
        "max_leak": config.max_leak,
        "skipped": build.skipped,
        "shards": names,
        "tokenizer": config.tokenizer,
        "identity": identity,
    }
    write_card(folder, manifest, splits, [text for shard in build.shards for text in shard["examples"]])
    write_json(folder / MANIFEST, manifest)
    tokens = sum(manifest[split]["tokens"] for split in SPLITS)
    build.log(
        f"Prepared {tokens:,} tokens in {seconds:.0f} s: {len(names)} shards in {folder}, read {folder}/card.md."
    )
    return manifest


def _sum_up(split: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A split over all shards: counts, and one digest of theirs."""
    digests = "".join(shard[split]["sha256"] for shard in shards)
    sums = {name: sum(shard[split][name] for shard in shards) for name in ("documents", "tokens")}
    return {**sums, "sha256": sha256(digests.encode()).hexdigest()}


def _refuse_leak(leak: Leak, config: PreparationConfig) -> None:
    if leak.percent > config.max_leak:
        raise UserError(
            f"{leak.percent:.1f} % of the held-out {leak.length}-grams stand in the training split too, more than "
            f"max_leak ({config.max_leak:g} %); drop near duplicates (--near_duplicates 0.7, a new --output_dir), or "
            f"raise --max_leak: the finished shards are kept."
        )
