"""Whether what is held out was trained on: shared n-grams of tokens.

As in the overlap studies of language models (Brown et al. 2020, "Language models are few-shot learners", appendix C)
n is 13. Of all n-grams one in eight is looked at, the same ones wherever they stand: those whose hash ends in 000.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.data.random_numbers import random_bits
from ds_stacking.data.token_file import Split, TokenFile

LENGTH = 13
_CHUNK = 2**20
_MULTIPLIER = 0x9E3779B97F4A7C15 | 1
_ZERO = np.zeros(1, np.int64)


@dataclass(frozen=True, kw_only=True)
class Leak:
    """How much of the held-out split stands in the training split."""

    ngrams: int
    """Held-out n-grams that were looked up."""
    found: int
    """Those that stand in the training split."""
    documents: int
    """Held-out documents with at least one n-gram looked up."""
    leaked_documents: int
    """Those of which half or more was found."""
    length: int = LENGTH
    """Tokens of an n-gram."""

    @property
    def percent(self) -> float:
        """Share of n-grams found, in percent."""
        return 100 * self.found / max(1, self.ngrams)


def refuse_leak(percent: float, limit: float, *, name: str, mend: str) -> None:
    """Raise UserError for a leak above `limit` percent; `name` is the setting that holds the limit."""
    if percent > limit:
        raise UserError(
            f"{percent:.1f} % of the held-out {LENGTH}-grams stand in the training split too, more than {name} "
            f"({limit:g} %); {mend}."
        )


def find_leak(train: Split, held_out: Split, sep: int) -> Leak:
    """Look up the held-out n-grams inside documents, in the training split; 20 to 30 ns per training token."""
    pieces = [_held_out(file, sep) for file in held_out.files]
    hashes = np.concatenate([hashes for hashes, _ in pieces])
    wanted = np.unique(hashes)
    was_found = np.zeros(len(wanted), bool)
    for file in train.files if len(wanted) else ():
        for begin in range(0, len(file) - LENGTH + 1, _CHUNK):
            present, _ = _sample(file.tokens[begin : begin + _CHUNK + LENGTH - 1])
            places = np.minimum(np.searchsorted(wanted, present), len(wanted) - 1)
            was_found[places[wanted[places] == present]] = True
    found = was_found[np.searchsorted(wanted, hashes)] if len(wanted) else np.zeros(0, bool)
    shares, begin = [], 0
    for of_file, owners in pieces:
        documents, counts = np.unique(owners, return_counts=True)
        hits = np.bincount(owners, found[begin : begin + len(of_file)], minlength=1)
        shares.append(hits[documents] / counts)
        begin += len(of_file)
    share = np.concatenate(shares)
    return Leak(
        ngrams=len(hashes),
        found=int(found.sum()),
        documents=len(share),
        leaked_documents=int(np.sum(share >= 0.5)),
    )


def _held_out(file: TokenFile, sep: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the sampled n-grams that cross no document's end, [G] uint64, and their documents, [G] int64."""
    tokens = np.asarray(file.tokens)
    if len(tokens) < LENGTH:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes, places = _sample(tokens)
    ends = np.concatenate((_ZERO, np.cumsum(tokens == sep)))  # document ends before each place
    inside = ends[places] == ends[places + LENGTH]
    return hashes[inside], ends[places[inside]]


def _sample(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and places of one in eight n-grams, [N] -> [G] uint64, [G] int64; a longer one from two shorter ones."""
    one = tokens.astype(np.uint64)
    two = _join(one, one, 1)
    four = _join(two, two, 2)
    eight = _join(four, four, 4)
    thirteen = _join(_join(eight, four, 8), one, 12)
    hashes = random_bits(thirteen, _ZERO)
    places = np.flatnonzero((hashes & np.uint64(7)) == 0)
    return hashes[places], places


def _join(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    """Polynomial hash of an n-gram of `length` followed by another."""
    count = len(second) - length
    power = pow(_MULTIPLIER, 1 << length, 2**64)  # any odd number that differs by length
    return first[:count] * np.uint64(power) + second[length:]
