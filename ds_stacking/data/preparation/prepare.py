"""The data of a run: prepared before, or prepared now into a cache that every rank of every run shares.

Any number of processes on any number of nodes may call `prepare` at the same time, before a process group exists: one
prepares under a file lock, the others wait and open what it made. A folder appears in the cache by one rename of a
complete one, so a killed process leaves nothing that is taken for finished; the next one goes on with its shards.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from ds_stacking.common.environment import cache_folder, rank
from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig
from ds_stacking.data.manifests import Damaged, FolderManifest, read_manifest, shard_folders
from ds_stacking.data.mixture import is_mixture
from ds_stacking.data.names import named_path, printable
from ds_stacking.data.preparation.build import Corpus, remove
from ds_stacking.data.preparation.claim import locked, stopped
from ds_stacking.data.preparation.folder import make_folder
from ds_stacking.data.preparation.leaks import refuse_leak
from ds_stacking.data.prepared_data import PreparedData, fingerprint, open_mixture, open_prepared
from ds_stacking.data.prepared_folder import is_prepared
from ds_stacking.data.tokenizer import load_tokenizer

_KEY = 24
"""Hexadecimal digits that name an entry of the cache."""
_FORMAT = 3
"""Part of that name; to be raised when entries are to be made anew."""
_MEND = "set corpus.cache_dir or $DS_STACKING_CACHE to another disk"
_MEND_LEAK = "drop near duplicates (--corpus.near_duplicates 0.7), or raise --corpus.max_leak"


def prepare(source: str, tokenizer: str, config: CorpusConfig, *, log: Callable[[str], None]) -> PreparedData:
    """Return the prepared data of a source: those of a folder of prepare_data.py, else the cache's, made if need be.

    `tokenizer` is `train`, a folder or a hub name. The cache is `config.cache_dir`, else $DS_STACKING_CACHE, else
    ~/.cache/ds_stacking. With `config.fingerprint` they must be the data of that fingerprint: those are taken from the
    cache, whatever made them, without a look at the source. A damaged entry of the cache is made again. Raises
    UserError for bad input, for a damaged folder, where a split is shorter than one sequence, where too much of what
    is held out stands in the training split and where the fingerprint is another; RunFailed where the cache's disk
    takes no more.
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
    root = cache_folder(config.cache_dir)
    for folder in sorted(root.glob("[0-9a-f]" * _KEY)) if config.fingerprint else ():
        with suppress(Damaged):
            manifest = read_manifest(folder, FolderManifest, inside=root)
            if fingerprint(manifest) == config.fingerprint and (data := _entry(folder, config, log)):
                return data
    return None


def _cached(source: str, tokenizer: str, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData:
    """The entry of the cache that a source and the settings decide, made if need be."""
    loaded = None if tokenizer == "train" else load_tokenizer(tokenizer)
    corpus = Corpus(source=source, tokenizer=loaded, reading=config, options=config)
    name = json.dumps({"cache": _FORMAT, **corpus.identity()}, sort_keys=True)
    root = cache_folder(config.cache_dir)
    folder = root / sha256(name.encode()).hexdigest()[:_KEY]
    if (data := _entry(folder, config, lambda _: None)) is not None:
        return data
    if rank():
        time.sleep(1.0)  # so that it is rank 0, whose lines are seen, that makes the entry
    with locked(root, folder.name, log):
        if (data := _entry(folder, config, log)) is None:
            with stopped(root, f"make room, or {_MEND}, and start again"):
                _make(folder, corpus, log)
            data = _open(folder, config, log)
    return data


def _entry(folder: Path, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData | None:
    """Open an entry of the cache; None where there is none, or a damaged one."""
    if not os.path.lexists(folder):
        return None
    try:
        return _open(folder, config, log)
    except Damaged as fault:
        log(f"{str(fault).partition('; ')[0]}; this entry of the cache is made again.")
        return None


def _open(folder: Path, config: CorpusConfig, log: Callable[[str], None]) -> PreparedData:
    data = open_prepared(folder, "train", config, log)
    leak = data.manifest["leak"]
    percent = 100 * leak["found"] / max(1, leak["ngrams"])
    refuse_leak(percent, config.max_leak, name="corpus.max_leak", mend=_MEND_LEAK)
    return data


def _make(folder: Path, corpus: Corpus, log: Callable[[str], None]) -> None:
    """Prepare into a hidden folder beside `folder`, then rename it. The caller holds the lock."""
    unfinished = folder.with_name(f".{folder.name}")
    try:
        make_folder(unfinished, corpus, log, mend=_MEND)
    except BaseException as error:
        # a UserError may say that the folder is another's, and who made it has cleaned it else
        if not isinstance(error, UserError) and not shard_folders(unfinished):
            remove(unfinished)
        raise
    remove(folder)  # a damaged one; who has mapped its files keeps them
    os.rename(unfinished, folder)
