"""What a worker process does to a batch of documents: clean, judge, tokenise.

The module imports neither torch nor transformers, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from ds_stacking.common.errors import RunFailed
from ds_stacking.data.names import first_line
from ds_stacking.data.preparation.documents import clean_text, digest, is_held_out, split_sentences
from ds_stacking.data.preparation.duplicates import signatures
from ds_stacking.data.sources.corpus import RawDocument

_EXAMPLE_CHARACTERS = 300
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


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


_tokenizer: DocumentTokenizer


def start(config: WorkerConfig | None) -> None:
    """Make this process a worker, which ends when its parent does, however that ends; None: one that only cleans."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    _follow_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores, their threads need not
    if config is not None:
        load(config)


def _follow_parent() -> None:
    """Have the kernel kill this process when its parent ends; a thread would wait for a long call of an expression."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before that
        os._exit(1)


def load(config: WorkerConfig) -> None:
    """Make the tokenizer: of a worker, or of a process that prepares a small corpus by itself."""
    global _tokenizer
    _tokenizer = DocumentTokenizer(config)


def clean(documents: Sequence[RawDocument]) -> list[str]:
    """Return the cleaned text of each document. Raises RunFailed, whatever went wrong."""
    with _said_in_words(documents):
        return [clean_text(document.plain()) for document in documents]


def tokenise(documents: Sequence[RawDocument]) -> Tokenised:
    """Clean and tokenise documents; the same answer in any worker. Raises RunFailed, whatever went wrong."""
    with _said_in_words(documents):
        return _tokenizer.tokenise(list(filter(None, clean(documents))))


@contextmanager
def _said_in_words(documents: Sequence[RawDocument]) -> Iterator[None]:
    """Turn an error into RunFailed; an error of its own class may not reach the parent."""
    try:
        yield
    except (RunFailed, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of `tokenizers` is no Exception
        raise RunFailed(
            f"A worker failed with {type(error).__name__} ({first_line(error)}) in documents, the first of which "
            f"begins {documents[0].text[:60]!r}; mend or remove the document, or give another tokenizer, and run the "
            f"command again: finished shards are kept."
        ) from None


class DocumentTokenizer:
    """Makes token ids of cleaned texts, and judges each."""

    def __init__(self, config: WorkerConfig) -> None:
        """All that BERT's normalizer does to clean ASCII is to lower its case. Without it `tokenizers` is half as fast
        again, so such texts have an encoder of their own."""
        self._config, self._encoder = config, _load(config.tokenizer)
        state = json.loads(config.tokenizer)
        normalizer = state["normalizer"] or {}
        self.has_ascii_encoder = normalizer.get("type") == "BertNormalizer"
        if self.has_ascii_encoder:
            self._ascii_encoder = _load(json.dumps(state | {"normalizer": None}))
        self._lowercase = bool(normalizer.get("lowercase"))

    def tokenise(self, texts: list[str]) -> Tokenised:
        """Tokenise and judge texts."""
        config = self._config
        pieces = [split_sentences(text) for text in texts] if config.sentences else [[text] for text in texts]
        ids = self.encode(list(chain.from_iterable(pieces)))
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))  # of pieces
        owners = np.repeat(np.arange(len(texts)), [len(group) for group in pieces])  # the text of each piece
        counts = np.bincount(owners, sizes, minlength=len(texts)).astype(np.int64)  # of texts
        kept = np.flatnonzero(counts)
        texts = [texts[i] for i in kept]
        words_of = [text.casefold().split() for text in texts]
        lengths = counts[kept] + 1
        return Tokenised(
            tokens=_join(ids, lengths, config),
            lengths=lengths,
            held_out=np.array([is_held_out(text, config.eval_percent) for text in texts], bool),
            digests=np.array([digest(words) for words in words_of], np.uint64),
            words=np.array(list(map(len, words_of)), np.int64),
            sentences=_sentence_starts(sizes, owners) if config.sentences else None,
            signatures=signatures(texts) if config.near_duplicates else None,
            example=texts[0][:_EXAMPLE_CHARACTERS] if texts else "",
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of cleaned texts."""
        ids: list[list[int]] = [[]] * len(texts)
        is_plain = [self.has_ascii_encoder and text.isascii() for text in texts]
        for wanted in (True, False):
            places = [place for place, plain in enumerate(is_plain) if plain == wanted]
            if not places:
                continue
            chosen = [texts[place].lower() if wanted and self._lowercase else texts[place] for place in places]
            encoder = self._ascii_encoder if wanted else self._encoder
            encodings = encoder.encode_batch_fast(chosen, add_special_tokens=False)
            for place, encoding in zip(places, encodings, strict=True):
                ids[place] = encoding.ids
        return ids


def _load(tokenizer: str) -> Tokenizer:
    encoder = Tokenizer.from_str(tokenizer)
    encoder.encode_special_tokens = True  # part of no tokenizer.json
    return encoder


def _join(ids: Iterable[list[int]], lengths: np.ndarray, config: WorkerConfig) -> np.ndarray:
    """Put the pieces one behind another, a [SEP] at the end of each document."""
    tokens = np.full(lengths.sum(), config.sep, config.dtype)
    is_token = np.ones(len(tokens), bool)
    is_token[np.cumsum(lengths) - 1] = False
    tokens[is_token] = np.fromiter(chain.from_iterable(ids), config.dtype)
    return tokens


def _sentence_starts(sizes: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Where each piece that has tokens begins, the [SEP] behind the documents before it counted."""
    filled = sizes > 0
    sizes, owners = sizes[filled], owners[filled]
    documents_before = np.cumsum(np.diff(owners, prepend=owners[:1]) > 0)
    return np.cumsum(sizes) - sizes + documents_before
