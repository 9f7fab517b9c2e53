"""Make the shards of a prepared folder: one process reads and writes, workers clean and tokenise in between.

Results are taken in the order of the source, so the shards are the same for any number of workers. A build that was
killed goes on behind its last finished shard: the source is read again up to there, but nothing else is done again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError
from ds_stacking.config import PreparationOptions, SourceConfig
from ds_stacking.data.manifests import SPLITS, TOKENIZER, ShardManifest, read_manifest, shard_folders, shard_name
from ds_stacking.data.names import printable
from ds_stacking.data.preparation import worker
from ds_stacking.data.preparation.configuration import SHARD_TOKENS
from ds_stacking.data.preparation.duplicates import DigestSet, NearDuplicates
from ds_stacking.data.preparation.pool import each
from ds_stacking.data.preparation.shards import ShardWriter
from ds_stacking.data.prepared_folder import find_fault, open_others
from ds_stacking.data.sources.corpus import RawDocument, identify_source, local_files, raw_documents
from ds_stacking.data.token_file import token_type
from ds_stacking.data.tokenizer import (
    TRAINING_CHARACTERS,
    TRAINING_DOCUMENTS,
    count_vocabulary,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    text_encoder,
    tokenizer_identity,
    train_tokenizer,
)

BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 50_000
"""Of very short documents: each takes memory beside its characters."""
_SECONDS_BETWEEN_LINES = 10.0
_FORMAT = 1
"""Of the shards; to be raised when the same input no longer gives the same arrays."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source, and how it is prepared."""

    source: str
    tokenizer: PreTrainedTokenizerBase | None
    """None: one is trained on the beginning of the source."""
    reading: SourceConfig
    options: PreparationOptions
    shard_tokens: int = SHARD_TOKENS
    batch_characters: int = BATCH_CHARACTERS
    """What a worker is given at once, a fraction of a second's work."""

    def identity(self) -> dict:
        """Everything that determines the shards, as JSON values."""
        return {
            "format": _FORMAT,
            "source": identify_source(self.source, self.reading),
            "tokenizer": tokenizer_identity(self.tokenizer, self.reading),
            "eval_percent": float(self.reading.eval_percent),
            "sentences": self.options.sentences,
            "near_duplicates": float(self.options.near_duplicates),
            "shard_tokens": self.shard_tokens,
        }


class Build:
    """A build under way."""

    def __init__(self, folder: Path, corpus: Corpus, log: Callable[[str], None]) -> None:
        """Take over what an earlier build of the same corpus left in `folder`: the tokenizer, else trained now, and
        the finished shards."""
        self.folder, self.corpus, self.log = folder, corpus, log
        self.shards: list[ShardManifest] = []
        self.read = 0
        """Documents of the source that the finished shards came from."""
        self.skipped: dict[str, str] = {}
        """Files that were left out, and why."""
        files = [] if corpus.source == "docs" else local_files(corpus.source, corpus.reading)
        self._total_bytes, self._bytes_read = sum(path.stat().st_size for path in files), 0
        self._begin = time.monotonic()
        self._next_line = self._begin + _SECONDS_BETWEEN_LINES
        self._batches: Iterator[list[RawDocument]] | None = None
        self.tokenizer = self._own_tokenizer()
        self._vocab_size = count_vocabulary(self.tokenizer)
        self._seen = DigestSet()
        threshold = corpus.options.near_duplicates
        self._near = NearDuplicates(threshold) if threshold else None
        self._adopt_finished_shards()
        self._tokens_before = self._tokens()

    def run(self) -> None:
        """Make the shards that are missing."""
        if self.shards:
            self.log(f"{len(self.shards)} finished shards are kept; going on behind document {self.read:,}.")
        self.log(f"Tokenising {printable(self.corpus.source)}.")
        if self._batches is None or self.read:
            self._batches = self._read_source()
        workers, setting = self.corpus.options.workers, worker_config(self.tokenizer, self.corpus)
        writer, read = self._next_shard(), self.read
        try:
            with closing(each(worker.tokenise, self._batches, workers, setting)) as results:
                for batch, result in results:
                    read += len(batch)
                    self._add(writer, len(batch), result)
                    self._show(writer)
                    if writer.tokens >= self.corpus.shard_tokens:
                        self.shards.append(writer.close(read))
                        writer = self._next_shard()
            if writer.tokens:
                self.shards.append(writer.close(read))
            elif not self.shards:
                raise UserError(
                    f"Nothing is left of the {read:,} documents of {self.corpus.source}; give readable text."
                )
        finally:
            writer.discard()  # what is not finished; a full disk needs its room

    def _read_source(self) -> Iterator[list[RawDocument]]:
        self._bytes_read = 0
        documents = raw_documents(self.corpus.source, self.corpus.reading, self.skipped, self._count)
        return in_batches(islice(documents, self.read, None), self.corpus.batch_characters)

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer, put there at the first time."""
        final, unfinished = self.folder / TOKENIZER, self.folder / f".{TOKENIZER}"
        if not final.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            save_tokenizer(self.corpus.tokenizer or self._trained_tokenizer(), unfinished)
            os.rename(unfinished, final)
        return load_tokenizer(str(final))

    def _trained_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer of the source's beginning, whose cleaned documents are kept to be tokenised: read once."""
        reading, options = self.corpus.reading, self.corpus.options
        self.log(f"Training a tokenizer of {reading.vocab_size:,} entries on the beginning of {self.corpus.source}.")
        source, texts, characters = self._read_source(), list[str](), 0
        cleaned: deque[list[RawDocument]] = deque()

        def needed() -> bool:
            return characters < TRAINING_CHARACTERS and len(texts) < TRAINING_DOCUMENTS

        def beginning() -> Iterator[list[RawDocument]]:
            while needed() and (batch := next(source, None)) is not None:
                yield batch

        with closing(each(worker.clean, beginning(), options.workers)) as results:
            for _, batch in results:
                cleaned.append([RawDocument(text) for text in batch])
                if needed():
                    texts += filter(None, batch)
                    characters += sum(map(len, batch))
        self._batches = chain((cleaned.popleft() for _ in range(len(cleaned))), source)
        return train_tokenizer(texts, reading.vocab_size, reading.lowercase)

    def _adopt_finished_shards(self) -> None:
        """Take over what an earlier run finished, every byte compared with its hash; remove what is behind a fault."""
        last = max((path.name for path in shard_folders(self.folder)), default="")
        for number in range(10**5):
            name = shard_name(number)
            if name > last:
                break
            if (fault := find_fault(self.folder, number, self._vocab_size)) is not None:
                self.log(f"{fault}; the shards from there on are made again.")
                for damaged in shard_folders(self.folder):
                    if damaged.name >= name:
                        remove(damaged)
                break
            manifest = read_manifest(self.folder / name, ShardManifest, inside=self.folder)
            self.shards.append(manifest)
            self.read = manifest["read"]
            others = open_others(self.folder, name, manifest)
            self._seen.add(np.array(others["digests"]))
            if self._near is not None and "signatures" in others:
                rows = np.array(others["signatures"])
                self._near.add(rows, np.ones(len(rows), bool))

    def _add(self, writer: ShardWriter, count: int, result: worker.Tokenised) -> None:
        """Append those of a batch's documents that were not there before."""
        is_new = self._seen.add(result.digests)
        keep = is_new if self._near is None else self._near.add(result.signatures, is_new)  # type: ignore[arg-type]
        writer.totals.update(equal=int(np.sum(~is_new)), near=int(np.sum(is_new & ~keep)), empty=count - len(is_new))
        writer.add(result, keep)

    def _next_shard(self) -> ShardWriter:
        sentences = self.corpus.options.sentences
        return ShardWriter(self.folder, len(self.shards), vocab_size=self._vocab_size, sentences=sentences)

    def _tokens(self) -> int:
        return sum(shard[split]["tokens"] for shard in self.shards for split in SPLITS)

    def _count(self, size: int) -> None:
        self._bytes_read += size

    def _show(self, writer: ShardWriter) -> None:
        """A line now and then: how far, how fast, how long still."""
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + _SECONDS_BETWEEN_LINES
        done, seconds = self._tokens() + writer.tokens, now - self._begin
        line = f"{done:,} tokens, {(done - self._tokens_before) / seconds:,.0f} tokens/s, shard {len(self.shards)}"
        if self._total_bytes and self._bytes_read:
            share = min(1.0, self._bytes_read / self._total_bytes)
            line += f", {share:.0%} of the source read, about {seconds * (1 - share) / share / 60:.0f} min left"
        self.log(line)


def worker_config(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> worker.WorkerConfig:
    """What decides a document's tokens and its side."""
    return worker.WorkerConfig(
        tokenizer=text_encoder(tokenizer).to_str(),
        sep=special_ids(tokenizer).sep,
        dtype=token_type(count_vocabulary(tokenizer)).name,
        eval_percent=corpus.reading.eval_percent,
        sentences=corpus.options.sentences,
        near_duplicates=bool(corpus.options.near_duplicates),
    )


def in_batches(documents: Iterable[RawDocument], most: int) -> Iterator[list[RawDocument]]:
    """Group documents to about `most` characters."""
    batch: list[RawDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= most or len(batch) >= _BATCH_DOCUMENTS:
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
