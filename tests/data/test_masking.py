"""Masking: exact counts, the 80/10/10 rule, uniform places, nothing special touched."""

import numpy as np
import pytest
from scipy.stats import chisquare

from ds_stacking.data.masking import _SPAN_LENGTHS, Masker
from ds_stacking.data.random_numbers import derive_keys

VOCAB = 105
BLOCKS, LENGTH = 4000, 24


@pytest.fixture(scope="module")
def input_ids() -> np.ndarray:
    """[B, T]: [CLS], ordinary tokens with a special one (PAD, UNK or SEP) here and there, [SEP]."""
    generator = np.random.default_rng(1)
    ids = generator.integers(5, VOCAB, (BLOCKS, LENGTH))
    ids[generator.random(ids.shape) < 0.1] = generator.choice([0, 1, 3])
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


@pytest.fixture(scope="module")
def masker(special) -> Masker:
    return Masker(special=special, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def masked(masker: Masker, input_ids: np.ndarray):
    return masker.mask(input_ids, derive_keys(1, 0, np.arange(BLOCKS)), 0.15)


def test_the_count_is_exact_in_every_sequence(masked, input_ids: np.ndarray):
    ordinary = (input_ids > 4).sum(1)
    assert len(set(ordinary)) > 5
    counts = np.bincount(masked.positions // LENGTH, minlength=BLOCKS)
    assert counts.tolist() == [round(0.15 * int(n)) for n in ordinary]


def test_labels_and_untouched_tokens(masked, input_ids: np.ndarray):
    assert (np.diff(masked.positions) > 0).all()
    assert (masked.labels == input_ids.ravel()[masked.positions]).all()
    assert (masked.labels > 4).all()
    untouched = np.ones(input_ids.size, bool)
    untouched[masked.positions] = False
    assert (masked.input_ids.ravel()[untouched] == input_ids.ravel()[untouched]).all()
    assert (masked.is_mask == (masked.input_ids.ravel()[masked.positions] == 4)).all()


def test_eighty_ten_ten(masked):
    now = masked.input_ids.ravel()[masked.positions]
    kept = (now == masked.labels) & ~masked.is_mask
    # A random token is by chance the right one once in 100 times, and then counts as kept.
    observed = [masked.is_mask.sum(), (~masked.is_mask & ~kept).sum(), kept.sum()]
    expected = np.array([0.8, 0.1 * 0.99, 0.1 * 1.01]) * len(now)
    assert chisquare(observed, expected).pvalue > 1e-4
    replaced = now[~masked.is_mask & ~kept]
    assert chisquare(np.bincount(replaced - 5, minlength=VOCAB - 5)).pvalue > 1e-4


def test_every_ordinary_place_is_equally_likely(masker: Masker):
    ids = np.full((20_000, 22), 7)
    ids[:, 0], ids[:, -1] = 2, 3
    masked = masker.mask(ids, derive_keys(2, 0, np.arange(20_000)), 0.15)
    counts = np.bincount(masked.positions % 22, minlength=22)
    assert counts[0] == counts[-1] == 0
    assert counts[1:-1].sum() == 3 * 20_000
    assert chisquare(counts[1:-1]).pvalue > 1e-4


def test_pairs_of_places_are_independent_of_their_distance(masker: Masker):
    ids = np.full((20_000, 22), 7)
    ids[:, 0], ids[:, -1] = 2, 3
    masked = masker.mask(ids, derive_keys(3, 0, np.arange(20_000)), 0.15)
    places = np.sort((masked.positions % 22).reshape(-1, 3), axis=1)
    triples = np.unique(places, axis=0, return_counts=True)[1]
    assert len(triples) == 20 * 19 * 18 // 6
    assert chisquare(triples).pvalue > 1e-4


def test_a_block_is_masked_alike_whatever_stands_beside_it(masker: Masker, input_ids: np.ndarray, masked):
    keys = derive_keys(1, 0, np.arange(BLOCKS))
    order = np.random.default_rng(0).permutation(BLOCKS)[:50]
    alone = np.concatenate([masker.mask(input_ids[i : i + 1], keys[i : i + 1], 0.15).input_ids for i in order])
    assert (alone == masked.input_ids[order]).all()


def whole_words(ids: np.ndarray) -> np.ndarray:
    """A number for the word of every token, special ones a word each, [B * T]; ids from 70 on continue a word."""
    continues = (ids >= 70) & (np.roll(ids, 1, axis=1) > 4)
    continues[:, 0] = False
    return np.cumsum(~continues.ravel()) - 1


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_stay_whole_and_spans_are_runs(special, input_ids: np.ndarray, unit):
    masker = Masker(special=special, vocab_size=VOCAB, unit=unit, continues=np.arange(VOCAB) >= 70)
    masked = masker.mask(input_ids, derive_keys(1, 0, np.arange(BLOCKS)), 0.15)
    chosen = np.zeros(input_ids.size, bool)
    chosen[masked.positions] = True
    words = whole_words(input_ids)
    shares = np.bincount(words, chosen) / np.bincount(words)
    assert set(shares) == {0.0, 1.0}
    assert len(masked.positions) / (input_ids > 4).sum() == pytest.approx(0.15, abs=0.01)
    assert (masked.labels > 4).all()
    runs = np.count_nonzero(np.diff(np.pad(shares[words[0] :].astype(int), 1)) == 1)
    assert (runs / shares.sum() > 0.75) == (unit == "word")  # words chosen alone make about as many runs as words
    assert masked.is_mask.mean() == pytest.approx(0.8, abs=0.02)


def test_a_span_is_replaced_as_one(special):
    ids = np.tile([2, *range(5, 105), 3], (300, 1))
    masker = Masker(special=special, vocab_size=VOCAB, unit="span", continues=np.zeros(VOCAB, bool))
    masked = masker.mask(ids, derive_keys(1, 0, np.arange(300)), 0.1)
    beside = np.diff(masked.positions) == 1
    same = masked.is_mask[1:] == masked.is_mask[:-1]
    assert same[beside].mean() > 0.9 and same[~beside].mean() < 0.8  # neighbours may belong to two spans


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_rates_may_differ_between_sequences(special, unit):
    ids = np.random.default_rng(0).integers(5, VOCAB, (2000, 40))
    masker = Masker(special=special, vocab_size=VOCAB, unit=unit, continues=np.arange(VOCAB) >= 70)
    rates = np.repeat([0.15, 0.3], 1000)
    masked = masker.mask(ids, derive_keys(1, 0, np.arange(2000)), rates)
    counts = np.bincount(masked.positions // 40, minlength=2000)
    assert [counts[:1000].mean() / 40, counts[1000:].mean() / 40] == pytest.approx([0.15, 0.3], abs=0.006)
    alone = masker.mask(ids[1500:1501], derive_keys(1, 0, np.array([1500])), 0.3)
    assert (alone.input_ids == masked.input_ids[1500]).all()


def test_blocks_without_ordinary_tokens_pass_through(masker: Masker):
    ids = np.array([[2, 3, 0, 0, 0, 0, 0, 0], [2, 9, 3, 0, 0, 0, 0, 0]])
    masked = masker.mask(ids, derive_keys(1, 0, np.arange(2)), 0.15)
    assert (masked.input_ids == ids).all() and masked.positions.size == 0


def test_shuffling_moves_ordinary_tokens_inside_their_sequence(masker: Masker, input_ids: np.ndarray):
    shuffled = masker.shuffle(input_ids, derive_keys(1, 0, np.arange(BLOCKS)))
    special = input_ids < 5
    assert (shuffled[special] == input_ids[special]).all()
    assert (np.sort(shuffled, axis=1) == np.sort(input_ids, axis=1)).all()
    assert (shuffled == input_ids)[~special].mean() < 0.1  # 1 of 20 stays at its place


def test_shuffling_is_uniform(masker: Masker):
    ids = np.tile([2, 5, 6, 3, 7, 3], (12_000, 1))
    shuffled = masker.shuffle(ids, derive_keys(1, 0, np.arange(12_000)))
    orders = np.unique(shuffled, axis=0, return_counts=True)[1]
    assert len(orders) == 6 and chisquare(orders).pvalue > 1e-4


def test_span_lengths_are_those_of_the_paper():
    """Joshi et al. 2020, section 3.1: geometric with p = 0.2, at most 10, mean 3.8; clipped they would have 4.46."""
    chances = 0.2 * 0.8 ** np.arange(10)
    renormalised = chances / chances.sum()
    clipped = np.append(chances[:9], 0.8**9)
    lengths = np.arange(1, 11)
    assert renormalised @ lengths == pytest.approx(3.797, abs=1e-3) and clipped @ lengths == pytest.approx(
        4.463, abs=1e-3
    )
    shares = np.bincount(_SPAN_LENGTHS, minlength=11)[1:] / len(_SPAN_LENGTHS)
    assert len(shares) == 10 and shares == pytest.approx(renormalised, abs=1 / 4096)
