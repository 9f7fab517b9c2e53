"""Counter-based random numbers and a keyed permutation: pure functions of a key, vectorised in NumPy.

A generator with a state would have to be stored, fast-forwarded and kept equal between ranks. Here number `t` of the
sequence with key `k` is a hash of both, so any rank can ask for any of them at any time.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """Finalise uint64 values in place: the bijection of SplitMix64."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def random_bits(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Return 64 random bits for every (key, counter), shapes broadcast together, as uint64.

    It is output `counter` of SplitMix64 started at `key` (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators", figure 14). Under one key, different counters give different values.
    """
    return _mix(key + (counter.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def derive_keys(seed: int, purpose: int, counter: np.ndarray) -> np.ndarray:
    """Return a uint64 key for every counter, [N] -> [N]; seeds and purposes give unrelated keys."""
    root = random_bits(np.array([seed % 2**64], np.uint64), np.array([purpose]))
    # Hashed twice: two roots may differ by a multiple of the counter's step and would then share shifted sequences.
    return random_bits(random_bits(root, counter), np.zeros(1, np.uint64))


def below(bits: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Map the upper 32 of random bits to integers in [0, bound), as int64; bound <= 2**32."""
    return (((bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return where the permutation of 0..n-1 chosen by each key sends each index, [N] -> [N] int64.

    Nothing of size n is stored. A Feistel network over pairs (left, right) with left < a, right < b permutes the a * b
    values, a and b being about the root of n; one of the few results outside 0..n-1 is sent through again until it is
    inside ("cycle walking"): Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3.
    """
    a = isqrt(max(n - 1, 0)) + 1
    b = -(-n // a)
    value = index.astype(np.int64)
    assert value.size == 0 or 0 <= value.min() <= value.max() < n, "index outside the permutation"
    outside = np.arange(value.size)
    while outside.size:
        value[outside] = _feistel(value[outside], a, b, keys[outside])
        outside = outside[value[outside] >= n]
    return value


def _feistel(value: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(value, b)
    for i in range(0, _FEISTEL_ROUNDS, 2):
        # The round's number sits above the bits of a half, so that every round has a function of its own.
        left = (left + below(random_bits(keys, right | (i << 48)), a)) % a
        right = (right + below(random_bits(keys, left | ((i + 1) << 48)), b)) % b
    return left * b + right
