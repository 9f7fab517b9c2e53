"""Which documents of a growing corpus were there before: exactly, by digest, and nearly, by MinHash.

Near duplicates are found as in Broder 1997, "On the resemblance and containment of documents": the share of equal
entries in two MinHash signatures estimates the Jaccard similarity of the documents' sets of shingles.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import count

import numpy as np

PERMUTATIONS = 128
"""Entries of a signature; its estimate of a similarity s has a standard deviation of sqrt(s (1 - s) / 128)."""
SHINGLE_WORDS = 5
"""Words of a shingle."""

PASSAGE = 10
"""Words and signs in a row that make a passage."""

_PIECES = re.compile(r"\w+|[^\w\s]")
_SCHEME = "affine32"
_SHINGLES_AT_ONCE = 4096
"""So many are hashed 128 times in the processor's cache."""


class DigestSet:
    """Set of 64-bit digests at 8 bytes each: sorted arrays, of which two are merged when they are of like size."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests [D] uint64; return which of them were new, [D] bool, the first of equal ones counting as new."""
        is_new = np.zeros(len(digests), bool)
        is_new[np.unique(digests, return_index=True)[1]] = True
        for level in self._levels:
            places = np.minimum(np.searchsorted(level, digests), len(level) - 1)
            is_new &= level[places] != digests
        if is_new.any():
            self._levels.append(np.sort(digests[is_new]))
        while len(self._levels) > 1 and len(self._levels[-1]) * 2 >= len(self._levels[-2]):
            last = self._levels.pop()
            self._levels[-1] = np.sort(np.concatenate((self._levels[-1], last)), kind="stable")
        return is_new


class Passages:
    """Which paragraphs hold nothing that was there before: no ten words and signs in a row, in any case.

    It takes some 70 bytes of memory for each word, so it is for small corpora that repeat themselves in pieces, which
    no digest of a whole document finds (Lee et al. 2022, "Deduplicating training data makes language models better").
    """

    def __init__(self) -> None:
        # tuples of numbers, unlike those of words, have the same hash in every process
        self._numbers: defaultdict[str, int] = defaultdict(count().__next__)
        self._seen: set[int] = set()

    def add(self, paragraph: str) -> bool:
        """Whether a paragraph is new; if so it is remembered. One of fewer words is a passage by itself."""
        pieces = _PIECES.findall(paragraph.casefold())
        numbers = [self._numbers[piece] for piece in pieces]
        passages = set(map(hash, zip(*(numbers[i:] for i in range(PASSAGE)), strict=False))) or {hash(tuple(numbers))}
        is_new = self._seen.isdisjoint(passages)
        if is_new:
            self._seen |= passages
        return is_new


class NearDuplicates:
    """Index of MinHash signatures that tells which documents are nearly the same as an earlier one."""

    def __init__(self, threshold: float) -> None:
        """`threshold` is the Jaccard similarity from which a document counts as a near duplicate."""
        from datasketch import MinHashLSH  # only who asks for near duplicates needs it

        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._kept: list[np.ndarray] = []

    def add(self, signatures: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return which of the candidates are new, [D] bool, and remember these; `signatures` are [D, 128] uint32."""
        is_new = candidates.copy()
        for row in np.flatnonzero(candidates):
            is_new[row] = self._add(signatures[row])
        return is_new

    def _add(self, signature: np.ndarray) -> bool:
        from datasketch import LeanMinHash

        minhash = LeanMinHash(seed=1, hashvalues=signature, scheme=_SCHEME)
        for key in self._index.query(minhash):
            if np.mean(self._kept[key] == signature) >= self._threshold:
                return False
        self._index.insert(len(self._kept), minhash, check_duplication=False)
        self._kept.append(signature)
        return True


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHash signatures of texts over their shingles of five words, [D, 128] uint32."""
    from datasketch import MinHash
    from xxhash import xxh32_intdigest

    rows = np.empty((len(texts), PERMUTATIONS), np.uint32)
    minhash = MinHash(num_perm=PERMUTATIONS, seed=1, scheme=_SCHEME, hashfunc=xxh32_intdigest)
    for row, text in zip(rows, texts, strict=True):
        words = text.casefold().split()
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(count)}
        minhash.clear()
        ordered = list(shingles)
        for begin in range(0, len(ordered), _SHINGLES_AT_ONCE):
            minhash.update_batch(ordered[begin : begin + _SHINGLES_AT_ONCE])
        row[:] = minhash.hashvalues
    return rows
