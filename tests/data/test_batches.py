"""A batch is a pure function of (seed, samples consumed); an epoch shows every token once."""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stacking.common.errors import UserError
from ds_stacking.data import batches as module
from ds_stacking.data.batches import Batch, EvalBatches, MaskedBatches
from ds_stacking.data.masking import Masked, Masker
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SpecialIds

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, all_ids=(0, 1, 2, 3, 4))


def make(
    length: int, sequence_length: int = 16, seed: int = 1, masking_rate: float = 0.15, **options: object
) -> MaskedBatches:
    """Batches of a stream in which every token tells its own place: 5, 6, 7, ..."""
    tokens = TokenFile(tokens=np.arange(5, length + 5, dtype=np.uint32), offsets=np.array([0, length]))
    return MaskedBatches(
        Split(files=[tokens]),
        sequence_length=sequence_length,
        masking_rate=masking_rate,
        masker=Masker(special=SPECIAL, vocab_size=length + 5),
        special=SPECIAL,
        seed=seed,
        **options,  # type: ignore[arg-type]
    )


def unmask(batch: Batch) -> torch.Tensor:
    """Return the sequence content, [B, T - 2], with the labels put back."""
    restored = batch.input_ids.clone()
    restored.view(-1)[batch.masked_positions] = batch.labels
    return restored[:, 1:-1]


def concatenate(parts: list[Batch], sequence_length: int) -> dict[str, torch.Tensor]:
    """Join batches as if they had been one."""
    joined: dict[str, list[torch.Tensor]] = {field.name: [] for field in fields(Batch)}
    rows = 0
    for part in parts:
        for field in fields(Batch):
            value = getattr(part, field.name)
            if value is not None:
                offset = rows * sequence_length if field.name == "masked_positions" else 0
                joined[field.name].append(value + offset if offset else value)
        rows += len(part.input_ids)
    return {name: torch.cat(values) for name, values in joined.items() if values}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def regrouped_equals_whole(batches: MaskedBatches, samples: np.ndarray, cuts: list[int]) -> bool:
    whole = concatenate([batches.batch(samples)], 16)
    parts = [batches.batch(part) for part in np.split(samples, sorted(cuts)) if len(part)]
    return equal(whole, concatenate(parts, 16))


def tokens_of_epoch(batches: MaskedBatches, epoch: int) -> Counter:
    n = len(batches)
    content = unmask(batches.batch(np.arange(epoch * n, (epoch + 1) * n)))
    return Counter(content.flatten().tolist())


@settings(deadline=None)  # time on a busy machine proves nothing
@given(length=st.integers(14, 700), sequence_length=st.integers(10, 40), epoch=st.integers(0, 10**9))
def test_every_token_exactly_once_per_epoch(length: int, sequence_length: int, epoch: int):
    if length < sequence_length - 2:
        return
    batches = make(length, sequence_length)
    seen = tokens_of_epoch(batches, epoch)
    used = len(batches) * (sequence_length - 2)
    assert length - used < sequence_length - 2
    assert seen == Counter(range(5, 5 + used))


def test_the_epoch_test_sees_random_draws(monkeypatch: pytest.MonkeyPatch):
    def draw(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).integers(0, n, len(places))

    monkeypatch.setattr(module, "permute", draw)
    assert max(tokens_of_epoch(make(700), 0).values()) > 1


@pytest.mark.parametrize("next_sentence", [False, True])
@settings(deadline=None)  # time on a busy machine proves nothing
@given(cuts=st.lists(st.integers(0, 60), max_size=6), start=st.integers(0, 10**12), seed=st.integers(0, 100))
def test_a_sample_is_the_same_in_any_grouping(next_sentence: bool, cuts: list[int], start: int, seed: int):
    batches = make(500, seed=seed, next_sentence=next_sentence)
    assert regrouped_equals_whole(batches, np.arange(start, start + 60), cuts)


def test_the_grouping_test_sees_a_generator_with_a_state(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    mask = Masker.mask

    def with_state(self: Masker, input_ids: np.ndarray, keys: np.ndarray, rates: np.ndarray) -> Masked:
        return mask(self, input_ids, generator.integers(0, 2**63, len(keys)).astype(np.uint64), rates)

    monkeypatch.setattr(Masker, "mask", with_state)
    assert not regrouped_equals_whole(make(500), np.arange(60), [20, 40])


def test_order_and_masks_change_with_epoch_and_seed():
    batches, n = make(3000), len(make(3000))
    first, second = batches.sequences_of(np.arange(n))[1], batches.sequences_of(np.arange(n, 2 * n))[1]
    other_seed = make(3000, seed=2).sequences_of(np.arange(n))[1]
    assert (first == second).mean() < 0.05 and (first == other_seed).mean() < 0.05
    again = n + int(np.flatnonzero(second == first[0])[0])  # the sample of epoch 1 that shows sample 0's sequence
    one, two = batches.batch(np.array([0])), batches.batch(np.array([again]))
    assert torch.equal(unmask(one), unmask(two))
    masks = [batches.batch(np.array([i * n])).masked_positions.tolist() for i in range(20)]
    assert len(set(map(tuple, masks))) > 10


def test_shapes_and_types(make_split: Callable[..., Split]):
    batches = MaskedBatches(
        make_split(5000),
        sequence_length=32,
        masking_rate=0.2,
        masker=Masker(special=SPECIAL, vocab_size=1000),
        special=SPECIAL,
        seed=1,
        next_sentence=True,
    )
    batch = batches.batch(np.arange(7)).to("cpu", non_blocking=True)
    assert batch.token_type_ids is not None and batch.next_sentence_labels is not None
    assert batch.input_ids.shape == batch.token_type_ids.shape == (7, 32)
    assert batch.masked_positions.shape == batch.labels.shape == batch.is_mask.shape
    assert batch.next_sentence_labels.shape == (7,)
    assert batch.is_mask.dtype == torch.bool
    integers = ("input_ids", "masked_positions", "labels", "token_type_ids", "next_sentence_labels")
    assert {getattr(batch, name).dtype for name in integers} == {torch.int64}


@pytest.mark.parametrize("next_sentence", [False, True])
def test_evaluation_is_fixed_and_its_control_shuffled(make_split: Callable[..., Split], next_sentence: bool):
    def build(sequences: int) -> EvalBatches:
        return EvalBatches(
            make_split(3000),
            sequences=sequences,
            sequence_length=32,
            masking_rate=0.15,
            masker=Masker(special=SPECIAL, vocab_size=1000),
            special=SPECIAL,
            next_sentence=next_sentence,
        )

    few, all_sequences = build(8), build(10**6)
    assert len(few) == 8 and len(all_sequences) == 3000 // (29 if next_sentence else 30)
    batch = all_sequences.batch(np.arange(8) * len(all_sequences) // 8)  # spread evenly over the split
    assert equal(concatenate([few.batch(np.arange(8))], 32), concatenate([batch], 32))
    assert equal(concatenate([few.batch(np.arange(i, i + 2)) for i in (0, 2, 4, 6)], 32), concatenate([batch], 32))

    assert few.fingerprint() == build(8).fingerprint() != build(9).fingerprint()
    control = few.shuffled(np.arange(8))
    assert torch.equal(control.masked_positions, batch.masked_positions)
    assert torch.equal(control.is_mask, batch.is_mask)
    assert not torch.equal(unmask(control), unmask(batch))
    assert torch.equal(unmask(control).sort(1).values, unmask(batch).sort(1).values)
    assert torch.equal(unmask(control) < 5, unmask(batch) < 5)


def test_the_masking_rate_follows_its_schedule():
    batches = make(40_000, sequence_length=102, masking_rate=0.3, masking_rate_end=0.1, samples=1001)
    counts = [len(batches.batch(np.array([sample])).labels) for sample in (0, 250, 500, 1000, 5000)]
    assert counts == [30, 25, 20, 10, 10]
    with pytest.raises(UserError, match="masking_rate"):
        make(500, sequence_length=16, masking_rate_end=0.01)


def test_settings_that_mask_nothing_are_refused():
    with pytest.raises(UserError, match="masking_rate"):
        make(500, sequence_length=8, masking_rate=0.05)


@given(taken=st.integers(1, 300))
@settings(deadline=None)  # time on a busy machine proves nothing
def test_each_length_has_whole_epochs_of_its_own(taken: int):
    """After so many samples of one length an epoch of another holds every token once; then the first goes on."""
    short, long = make(900, 16), make(900, 32)
    n = len(long)
    seen = Counter(unmask(long.batch(np.arange(taken, taken + n), taken)).flatten().tolist())
    assert seen == Counter(range(5, 5 + n * 30))
    left = -taken % len(short)
    rest = short.batch(np.arange(taken + n, taken + n + left), n)
    begun = short.batch(np.arange(taken - taken % len(short), taken))
    seen = Counter(torch.cat([unmask(begun), unmask(rest)]).flatten().tolist())
    assert not left or seen == Counter(range(5, 5 + len(short) * 14))


def test_the_test_of_lengths_sees_one_count_for_all():
    """As it was before: the epoch of the new length is over too early, or begins in its middle."""
    long = make(900, 32)
    assert max(Counter(unmask(long.batch(np.arange(17, 17 + len(long)))).flatten().tolist()).values()) > 1


def test_the_longest_document_is_known_on_the_host() -> None:
    batches = make(600, separate_documents=True)
    batch = batches.batch(np.arange(8))
    assert batch.cu_seqlens is not None and batch.max_seqlen == int(batch.cu_seqlens.diff().max()) == 16
    moved = batch.to("meta")  # a device that cannot be asked
    assert moved.max_seqlen == 16 and moved.inputs["max_seqlen"] == 16
    assert make(600).batch(np.arange(8)).inputs["max_seqlen"] is None
