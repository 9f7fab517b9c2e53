"""Make the shards of a prepared folder: one process reads and writes, workers clean and tokenise in between.

Results are taken in the order of the source, so the shards are the same for any number of workers. A build that was
killed goes on behind its last finished shard: the source is read again up to there, but nothing else is done again.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError
from ds_stacking.data.manifests import SPLITS, ShardManifest, read_manifest, shard_folders, shard_name
from ds_stacking.data.preparation import worker
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.duplicates import DigestSet, NearDuplicates
from ds_stacking.data.preparation.shards import ShardWriter, find_fault, open_others
from ds_stacking.data.sources.corpus import RawDocument, local_files, raw_documents
from ds_stacking.data.token_file import token_type
from ds_stacking.data.tokenizer import count_vocabulary

Item = TypeVar("Item")
Result = TypeVar("Result")
_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 50_000
"""Of very short documents: each takes memory beside its characters."""
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(kw_only=True)
class Build:
    """A build under way."""

    config: PreparationConfig
    folder: Path
    log: Callable[[str], None]
    tokenizer: PreTrainedTokenizerBase
    shards: list[ShardManifest] = field(default_factory=list)
    """Manifests of the finished shards."""
    read: int = 0
    """Documents of the source that the finished shards came from."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that were left out, and why."""
    bytes_read: int = 0
    """Of local files."""

    def __post_init__(self) -> None:
        self.begin = time.monotonic()
        self.next_line = self.begin + _SECONDS_BETWEEN_LINES
        files = [] if self.config.data == "docs" else local_files(self.config.data, self.config.corpus)
        self.total_bytes = sum(path.stat().st_size for path in files)
        self.seen = DigestSet()
        threshold = self.config.near_duplicates
        self.near = NearDuplicates(threshold) if threshold else None
        self.tokens_before = 0

    def adopt_finished_shards(self) -> None:
        """Take over what an earlier run finished, every byte compared with its hash; remove what is behind a fault."""
        last = max((path.name for path in shard_folders(self.folder)), default="")
        vocab_size = count_vocabulary(self.tokenizer)
        for number in range(10**5):
            name = shard_name(number)
            if name > last:
                break
            if (fault := find_fault(self.folder, number, vocab_size)) is not None:
                self.log(f"{fault}; the shards from there on are made again.")
                for damaged in shard_folders(self.folder):
                    if damaged.name >= name:
                        remove(damaged)
                break
            manifest = read_manifest(self.folder / name, ShardManifest, inside=self.folder)
            self.shards.append(manifest)
            self.read = manifest["read"]
            others = open_others(self.folder, name, manifest)
            self.seen.add(np.array(others["digests"]))
            if self.near is not None and "signatures" in others:
                rows = np.array(others["signatures"])
                self.near.add(rows, np.ones(len(rows), bool))
        self.tokens_before = sum(shard[split]["tokens"] for shard in self.shards for split in SPLITS)

    def run(self, pool: ProcessPoolExecutor, window: int) -> None:
        """Make the shards that are missing, with `window` batches of documents under way."""
        writer = self._next_shard()
        try:
            read = self.read
            for count, result in self._results(pool, window):
                read += count
                self._add(writer, count, result)
                self._show(writer)
                if writer.tokens >= self.config.shard_tokens:
                    self._finish_shard(writer, read)
                    writer = self._next_shard()
            if writer.tokens:
                self._finish_shard(writer, read)
            elif not self.shards:
                raise UserError(
                    f"Nothing is left of the {read:,} documents of {self.config.data}; give readable text."
                )
        finally:
            writer.discard()  # what is not finished; a full disk needs its room

    def _add(self, writer: ShardWriter, count: int, result: worker.Tokenised) -> None:
        """Append those of a batch's documents that were not there before."""
        is_new = self.seen.add(result.digests)
        keep = is_new if self.near is None else self.near.add(result.signatures, is_new)  # type: ignore[arg-type]
        writer.totals.update(equal=int(np.sum(~is_new)), near=int(np.sum(is_new & ~keep)), empty=count - len(is_new))
        writer.add(result, keep)

    def _next_shard(self) -> ShardWriter:
        vocab_size = count_vocabulary(self.tokenizer)
        return ShardWriter(
            self.folder, len(self.shards), token_type(vocab_size), vocab_size, sentences=self.config.sentences
        )

    def _finish_shard(self, writer: ShardWriter, read: int) -> None:
        self.shards.append(writer.close(read))

    def _results(self, pool: ProcessPoolExecutor, window: int) -> Iterator[tuple[int, worker.Tokenised]]:
        """Batches in the order of the source, each with the number of its raw documents."""
        source = raw_documents(self.config.data, self.config.corpus, self.skipped, self._count)
        for batch, result in ahead(pool, worker.tokenise, in_batches(islice(source, self.read, None)), window):
            yield len(batch), result

    def _count(self, size: int) -> None:
        self.bytes_read += size

    def _show(self, writer: ShardWriter) -> None:
        """A line now and then: how far, how fast, how long still."""
        now = time.monotonic()
        if now < self.next_line:
            return
        self.next_line = now + _SECONDS_BETWEEN_LINES
        done = sum(shard[split]["tokens"] for shard in self.shards for split in SPLITS) + writer.tokens
        seconds = now - self.begin
        line = f"{done:,} tokens, {(done - self.tokens_before) / seconds:,.0f} tokens/s, shard {len(self.shards)}"
        if self.total_bytes and self.bytes_read:
            share = min(1.0, self.bytes_read / self.total_bytes)
            line += f", {share:.0%} of the source read, about {seconds * (1 - share) / share / 60:.0f} min left"
        self.log(line)


def ahead(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[tuple[Item, Result]]:
    """Yield every item with `function(item)`, in order, while up to `window` further ones are computed by the pool."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > window:
            first, future = waiting.popleft()
            yield first, future.result()
    for item, future in waiting:
        yield item, future.result()


def in_batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Group documents to about a million characters, a fraction of a second's work."""
    batch: list[RawDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def remove(path: Path) -> None:
    """Remove a file or link, or a folder with all in it; links in it are removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
