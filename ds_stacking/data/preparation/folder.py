"""Prepare a folder (data/prepared_folder.py): for prepare_data.py, or as an entry of the cache."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_stacking.common.errors import RunFailed, require
from ds_stacking.common.files import write_json
from ds_stacking.data.manifests import MANIFEST, SPLITS, Damaged, FolderManifest, shard_name, sum_up
from ds_stacking.data.names import named_path, printable
from ds_stacking.data.preparation.build import BATCH_CHARACTERS, Build, Corpus
from ds_stacking.data.preparation.card import write_card
from ds_stacking.data.preparation.claim import claimed, stopped
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.leaks import Leak, find_leak, refuse_leak
from ds_stacking.data.prepared_folder import open_folder, open_splits, token_counts, verify_folder
from ds_stacking.data.token_file import unigram_entropy
from ds_stacking.data.tokenizer import count_vocabulary, load_tokenizer, special_ids, tokenizer_hash

_MEND_LEAK = (
    "drop near duplicates (--near_duplicates 0.7, a new --output_dir), or raise --max_leak: the finished shards are "
    "kept"
)


def prepare_folder(
    config: PreparationConfig, log: Callable[[str], None], *, batch_characters: int = BATCH_CHARACTERS
) -> Any:
    """Prepare `config.output_dir`, or go on where an earlier run was stopped; return its manifest.

    In a finished folder every byte is compared with its hash, and damaged shards are made again; with `config.verify`
    they are refused. Raises UserError for bad input, for a folder that was begun with other settings, and where
    held-out text stands in the training split; RunFailed for a full disk, a lost worker and Ctrl-C.
    """
    folder = named_path(config.output_dir)
    if config.verify:
        return verify_folder(folder, log)
    _refuse_own_output(config.data, folder)
    corpus = Corpus(
        source=config.data,
        tokenizer=None if config.tokenizer == "train" else load_tokenizer(config.tokenizer),
        reading=config.corpus,
        options=config,
        shard_tokens=config.shard_tokens,
        batch_characters=batch_characters,
    )

    def check(leak: Leak) -> None:
        refuse_leak(leak.percent, config.max_leak, name="max_leak", mend=_MEND_LEAK)

    try:
        with stopped(
            folder,
            "mend that, such as by making room on the disk, then give the same command again: it goes on behind the "
            "last finished shard",
        ):
            return make_folder(folder, corpus, log, check=check, mend="choose another --output_dir")
    except KeyboardInterrupt:
        raise RunFailed(
            f"Preparing {printable(folder)} was stopped by Ctrl-C; give the same command to go on."
        ) from None


def make_folder(
    folder: Path,
    corpus: Corpus,
    log: Callable[[str], None],
    *,
    mend: str,
    check: Callable[[Leak], None] = lambda leak: None,
) -> FolderManifest:
    """Make the prepared folder of a corpus, or what it lacks; return its manifest, which is written last.

    `check` may refuse a leak before that; `mend` says in messages what to do where the folder cannot be taken.
    """
    with claimed(folder, identity := corpus.identity(), mend):
        begin = time.monotonic()
        build = Build(folder, corpus, log)
        if os.path.lexists(folder / MANIFEST):
            try:
                manifest, _ = open_folder(folder)
                log(f"{folder} is finished; {len(build.shards)} shards have the bytes that were written.")
                return manifest
            except Damaged as fault:
                log(str(fault).partition("; ")[0] + "; what is missing is made again.")
                (folder / MANIFEST).unlink()
        build.run()
        manifest = _finish(build, identity, check)
    tokens, documents = (sum(manifest[split][kind] for split in SPLITS) for kind in ("tokens", "documents"))
    before = sum(manifest["totals"].get(kind, 0) for kind in ("equal", "near"))
    log(
        f"Prepared {tokens:,} tokens of {documents:,} documents in {time.monotonic() - begin:.0f} s; "
        f"{before:,} that were there before left out; see card.md."
    )
    if build.skipped:
        name, what = next(iter(build.skipped.items()))
        log(f"Left out {len(build.skipped)} files that are not readable text, such as {name}: {what}.")
    return manifest


def _refuse_own_output(source: str, folder: Path) -> None:
    """Raise UserError where the prepared folder would lie in the source, and be read as text the next time."""
    path = named_path(source)
    if source != "docs" and path.is_dir():
        require(
            not folder.resolve().is_relative_to(path.resolve()),
            f"output_dir {printable(folder)} lies in the data source {printable(source)}, which is searched for text; "
            f"choose a folder elsewhere.",
        )


def _finish(build: Build, identity: dict[str, Any], check: Callable[[Leak], None]) -> Any:
    """Sum up, check that nothing held out was trained on, write the card and at last the manifest."""
    folder, corpus, tokenizer = build.folder, build.corpus, build.tokenizer
    shards = {shard_name(number): facts for number, facts in enumerate(build.shards)}
    splits, special = open_splits(folder, shards), special_ids(tokenizer)
    check(leak := find_leak(splits["train"], splits["eval"], special.sep))
    totals: Counter[str] = Counter()
    for shard in build.shards:
        totals.update(shard["totals"])
    manifest: Any = {
        "dtype": build.shards[0]["dtype"],
        "vocab_size": count_vocabulary(tokenizer),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        **{split: sum_up(split, build.shards) | {"tokens_sha256": splits[split].digest()} for split in SPLITS},
        "unigram_entropy": unigram_entropy(token_counts(folder, shards), special.all_ids),
        "read": build.shards[-1]["read"],
        "totals": dict(totals),
        "leak": asdict(leak),
        "max_leak": corpus.options.max_leak,
        "skipped": build.skipped,
        "shards": list(shards),
        "tokenizer": printable(corpus.tokenizer.name_or_path) if corpus.tokenizer else "train",
        "identity": identity,
    }
    write_card(folder, manifest, splits, [text for shard in build.shards for text in shard["examples"]])
    write_json(folder / MANIFEST, manifest, inside=folder)
    return manifest
