"""Counter-based random numbers and the keyed permutation."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ds_stacking.data.random_numbers import below, derive_keys, permute, random_bits


def test_bits_are_those_of_splitmix64():
    # Published first outputs of SplitMix64 for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert random_bits(np.array([1234567], np.uint64), np.arange(4)).tolist() == expected


def test_keys_differ_by_seed_purpose_and_counter():
    keys = np.concatenate([derive_keys(seed, purpose, np.arange(100)) for seed in range(20) for purpose in range(5)])
    assert len(np.unique(keys)) == 20 * 5 * 100


def test_below_is_uniform():
    draws = below(random_bits(derive_keys(1, 0, np.arange(1)), np.arange(70_000)), 7)
    assert chisquare(np.bincount(draws, minlength=7)).pvalue > 1e-4


@settings(deadline=None)  # time on a busy machine proves nothing
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_every_index_is_hit_exactly_once(n: int, seed: int):
    keys = derive_keys(seed, 0, np.zeros(n, np.int64))
    assert sorted(permute(np.arange(n), n, keys)) == list(range(n))


def test_every_order_of_four_is_equally_likely():
    keys = derive_keys(5, 0, np.arange(24_000))
    orders = zip(*(permute(np.full(24_000, i), 4, keys) for i in range(4)), strict=True)
    counts = Counter(orders)
    assert len(counts) == 24
    assert chisquare(list(counts.values())).pvalue > 1e-4


def test_neighbours_are_scattered():
    places = permute(np.arange(10_000), 10_000, derive_keys(1, 0, np.zeros(10_000, np.int64)))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04  # 4 standard deviations


@pytest.mark.parametrize("n", [10**8, 10**10 + 19])
def test_huge_ranges_need_no_table(n: int):
    index = np.unique(np.random.default_rng(0).integers(0, n, 5000))
    places = permute(index, n, derive_keys(1, 0, np.zeros(len(index), np.int64)))
    assert places.min() >= 0 and places.max() < n
    assert len(np.unique(places)) == len(index)
