"""What a worker process does to a batch of documents: clean, judge, tokenise.

The module imports neither torch nor transformers, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from ds_stacking.data.corpus import RawDocument
from ds_stacking.data.documents import clean_text, digest, is_held_out
from ds_stacking.data.duplicates import signatures
from ds_stacking.data.sentences import split_sentences

_EXAMPLE_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What every worker is told once."""

    tokenizer: str
    """The tokenizer as JSON of `tokenizers`."""
    sep: int
    """Token that ends a document."""
    dtype: str
    """Type of the token ids."""
    eval_percent: float
    """Share of held-out documents."""
    sentences: bool
    """Whether sentences are wanted."""
    near_duplicates: bool
    """Whether MinHash signatures are wanted."""


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """D documents, tokenised; those without a token are left out."""

    tokens: np.ndarray
    """Token ids of all documents, each followed by [SEP], [N] uint16 or uint32."""
    lengths: np.ndarray
    """Tokens of each document, its [SEP] included, [D] int64."""
    held_out: np.ndarray
    """Whether it is for evaluation, [D] bool."""
    digests: np.ndarray
    """What finds equal documents, [D] uint64."""
    words: np.ndarray
    """Words between blanks of each document, [D] int64."""
    sentences: np.ndarray | None
    """Where in `tokens` each sentence begins, [S] int64."""
    signatures: np.ndarray | None
    """MinHash signatures, [D, 128] uint32."""
    example: str
    """The beginning of the first document."""


_worker: WorkerConfig
_encoder: Tokenizer


def start(config: WorkerConfig | None) -> None:
    """Make this process a worker, which ends when its parent does, however that ends; None: one that only cleans."""
    global _worker, _encoder
    threading.Thread(target=_follow_parent, daemon=True).start()
    if config is None:
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores, their threads need not
    _worker, _encoder = config, Tokenizer.from_str(config.tokenizer)
    _encoder.encode_special_tokens = True  # part of no tokenizer.json


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def clean(documents: Sequence[RawDocument]) -> list[str]:
    """Return the cleaned texts of documents, empty ones left out."""
    return [text for document in documents if (text := clean_text(document.plain()))]


def tokenise(documents: Sequence[RawDocument]) -> Tokenised:
    """Clean and tokenise documents; the same answer in any worker."""
    texts = clean(documents)
    pieces = [split_sentences(text) for text in texts] if _worker.sentences else [[text] for text in texts]
    encodings = _encoder.encode_batch_fast(list(chain.from_iterable(pieces)), add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))  # of pieces
    owners = np.repeat(np.arange(len(texts)), [len(group) for group in pieces])  # the text of each piece
    counts = np.bincount(owners, sizes, minlength=len(texts)).astype(np.int64)  # of texts
    kept = np.flatnonzero(counts)
    texts = [texts[i] for i in kept]
    lengths = counts[kept] + 1
    return Tokenised(
        tokens=_join(ids, lengths),
        lengths=lengths,
        held_out=np.array([is_held_out(text, _worker.eval_percent) for text in texts], bool),
        digests=np.array([digest(text) for text in texts], np.uint64),
        words=np.array([len(text.split()) for text in texts], np.int64),
        sentences=_sentence_starts(sizes, owners) if _worker.sentences else None,
        signatures=signatures(texts) if _worker.near_duplicates else None,
        example=texts[0][:_EXAMPLE_CHARACTERS] if texts else "",
    )


def _join(ids: Iterable[list[int]], lengths: np.ndarray) -> np.ndarray:
    """Put the pieces one behind another, a [SEP] at the end of each document."""
    tokens = np.full(lengths.sum(), _worker.sep, _worker.dtype)
    is_token = np.ones(len(tokens), bool)
    is_token[np.cumsum(lengths) - 1] = False
    tokens[is_token] = np.fromiter(chain.from_iterable(ids), _worker.dtype)
    return tokens


def _sentence_starts(sizes: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Where each piece that has tokens begins, the [SEP] behind the documents before it counted."""
    filled = sizes > 0
    sizes, owners = sizes[filled], owners[filled]
    documents_before = np.cumsum(np.diff(owners, prepend=owners[:1]) > 0)
    return np.cumsum(sizes) - sizes + documents_before
