"""Masked batches as a pure function of (seed, samples consumed).

Sample number s is sequence `permutation_e(s mod n)` of epoch e = s div n, masked with random numbers of its own. So a
batch depends neither on the number of ranks nor on how its samples are grouped, and a run is resumed by one integer;
or two, where the length of sequences changes: each length has sequences and epochs of its own, and samples of other
lengths are taken from s before that.

Shapes: B sequences of a batch, T tokens of a sequence, M masked positions of a batch, S documents in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.data.masking import Masker
from ds_stacking.data.mixture import Interleaving, Mixture
from ds_stacking.data.random_numbers import derive_keys, permute
from ds_stacking.data.sequences import SequenceReader, Sequences, read_mixed
from ds_stacking.data.token_file import Split
from ds_stacking.data.tokenizer import SpecialIds

_ORDER, _PAIRS, _MASKING = range(_PURPOSES := 3)
_EVAL_SEED = 20190609


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A masked batch as tensors."""

    input_ids: torch.Tensor
    """[B, T] int64"""
    masked_positions: torch.Tensor
    """Flat indices b * T + t of the tokens to predict, ascending, [M] int64."""
    labels: torch.Tensor
    """The tokens that stood there, [M] int64."""
    is_mask: torch.Tensor
    """Whether the input there is [MASK], [M] bool."""
    token_type_ids: torch.Tensor | None = None
    """[B, T] int64: segment 0 or 1; None for plain sequences."""
    next_sentence_labels: torch.Tensor | None = None
    """[B] int64: 0 where segment B follows A, else 1; None for plain sequences."""
    cu_seqlens: torch.Tensor | None = None
    """Bounds of documents among the B*T tokens, [S + 1] int32; None where a sequence is attended to whole."""
    max_seqlen: int | None = None
    """Tokens of the longest document, known on the host, which need not ask the device; None where `cu_seqlens` is."""

    @property
    def inputs(self) -> dict[str, torch.Tensor | int | None]:
        """The arguments of `Bert.forward`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "is_mask"}

    @property
    def pairs(self) -> tuple[int, int]:
        """(Query, key) pairs that see each other, of all tokens and of the predicted ones; for batches on the host."""
        if self.cu_seqlens is None:
            length = self.input_ids.shape[1]
            return self.input_ids.numel() * length, len(self.labels) * length
        lengths = self.cu_seqlens.diff().long()
        document = torch.searchsorted(self.cu_seqlens[1:].long(), self.masked_positions, right=True)
        return int(lengths.square().sum()), int(lengths[document].sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a copy to the GPU need not block."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        mapped: dict[str, Any] = {
            name: function(value) if isinstance(value, torch.Tensor) else value for name, value in values
        }
        return Batch(**mapped)


class MaskedBatches:
    """Training batches by sample numbers. `len()` is the number of sequences, that is of samples in an epoch."""

    def __init__(
        self,
        data: Split | Mixture,
        *,
        sequence_length: int,
        masking_rate: float,
        masker: Masker,
        special: SpecialIds,
        seed: int,
        next_sentence: bool = False,
        separate_documents: bool = False,
        masking_rate_end: float | None = None,
        samples: int = 0,
    ) -> None:
        """With `masking_rate_end` the rate changes linearly from the first to the last of `samples` samples.

        Raises UserError if the split is shorter than one sequence or no token of a sequence would be masked.
        """
        self._rate, self._slope = masking_rate, 0.0
        if masking_rate_end is not None:
            self._slope = (masking_rate_end - masking_rate) / max(1, samples - 1)
        for rate in (masking_rate, masking_rate if masking_rate_end is None else masking_rate_end):
            require_masked_tokens(sequence_length, rate)
        mixture = Mixture.of(data)
        self._readers = _readers(mixture, sequence_length, special, next_sentence, separate_documents)
        self._interleaving = Interleaving(mixture.weights)
        self._masker = masker
        self._seed = seed
        self._samples = samples

    def __len__(self) -> int:
        return sum(map(len, self._readers))

    def sequences_of(self, sample_indices: np.ndarray, of_other_lengths: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return source and sequence of every sample number, [B] int64 each; in constant time for any number.

        `of_other_lengths` of the samples before them were of another length, and are none of these sequences' epochs.
        """
        sources, numbers = self._interleaving.locate(np.asarray(sample_indices, np.int64) - of_other_lengths)
        sequences = np.empty_like(numbers)
        for source, reader in enumerate(self._readers):
            chosen = np.flatnonzero(sources == source)
            epochs, places = np.divmod(numbers[chosen], len(reader))
            purpose = _ORDER + source * _PURPOSES
            sequences[chosen] = permute(places, len(reader), derive_keys(self._seed, purpose, epochs))
        return sources, sequences

    def batch(self, sample_indices: np.ndarray, of_other_lengths: int = 0) -> Batch:
        """Return the samples with these numbers, [B] int64, counted from 0 over all epochs and lengths."""
        samples = np.asarray(sample_indices, np.int64)
        sequences = read_mixed(
            self._readers, *self.sequences_of(samples, of_other_lengths), derive_keys(self._seed, _PAIRS, samples)
        )
        return _masked(sequences, self._masker, derive_keys(self._seed, _MASKING, samples), self._rates(samples))

    def _rates(self, samples: np.ndarray) -> np.ndarray:
        """The masking rate of every sample, [B] float64."""
        return self._rate + self._slope * np.clip(samples, 0, max(0, self._samples - 1))


class EvalBatches:
    """Sequences spread evenly over the held-out split, masked in the same way each time. `len()` is their number.

    `shuffled` gives the control: the same sequences and masked positions with the ordinary tokens permuted inside each
    sequence. A model that uses more than which words occur must do worse there.
    """

    def __init__(
        self,
        data: Split | Mixture,
        *,
        sequences: int,
        sequence_length: int,
        masking_rate: float,
        masker: Masker,
        special: SpecialIds,
        next_sentence: bool = False,
        separate_documents: bool = False,
    ) -> None:
        """Use `sequences` sequences, or all where there are fewer. Raise UserError as MaskedBatches does."""
        require_masked_tokens(sequence_length, masking_rate)
        mixture = Mixture.of(data)
        self._readers = _readers(mixture, sequence_length, special, next_sentence, separate_documents)
        self._masker, self._rate = masker, masking_rate
        self._sources, self._places = _spread(sequences, mixture.weights, [len(reader) for reader in self._readers])

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return sequences by index in [0, len), [B] int64."""
        sequences, keys = self._read(indices)
        return _masked(sequences, self._masker, keys, self._rate)

    def fingerprint(self) -> str:
        """Digest of all sequences and their masks: equal for two runs exactly if they are evaluated on the same."""
        hashed = sha256()
        for indices in np.array_split(np.arange(len(self)), -(-len(self) // 1024)):
            batch = self.batch(indices)
            for tensor in (batch.input_ids, batch.masked_positions, batch.labels):
                hashed.update(tensor.numpy().tobytes())
        return hashed.hexdigest()[:16]

    def shuffled(self, indices: np.ndarray) -> Batch:
        """Return the same sequences with shuffled tokens, masked at the same positions."""
        sequences, keys = self._read(indices)
        shuffled = self._masker.shuffle(sequences.input_ids, keys)
        return _masked(replace(sequences, input_ids=shuffled), self._masker, keys, self._rate)

    def _read(self, indices: np.ndarray) -> tuple[Sequences, np.ndarray]:
        """The sequences and the keys of their masks, which are their own, however many others are evaluated."""
        assert np.all((indices >= 0) & (indices < len(self))), "evaluation sequence out of range"
        sources, places = self._sources[indices], self._places[indices]
        identities = places + (sources << 40)  # those of a single source are its places
        sequences = read_mixed(self._readers, sources, places, derive_keys(_EVAL_SEED, _PAIRS, identities))
        return sequences, derive_keys(_EVAL_SEED, _MASKING, identities)


def _readers(
    mixture: Mixture, sequence_length: int, special: SpecialIds, next_sentence: bool, separate_documents: bool
) -> list[SequenceReader]:
    """A reader of each source."""
    return [
        SequenceReader(
            split,
            sequence_length=sequence_length,
            special=special,
            next_sentence=next_sentence,
            separate_documents=separate_documents,
        )
        for split in mixture.splits
    ]


def _spread(sequences: int, weights: Sequence[float], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Source and place of so many sequences, or all there are, spread evenly over each source, [count] int64 each."""
    sources, _ = Interleaving(weights).locate(np.arange(sequences))
    counts = np.minimum(np.bincount(sources, minlength=len(lengths)), lengths)
    # not the first sequences: they come from a few documents
    places = [np.arange(count) * length // max(1, count) for count, length in zip(counts, lengths, strict=True)]
    return np.repeat(np.arange(len(lengths)), counts), np.concatenate(places)


def require_masked_tokens(sequence_length: int, masking_rate: float) -> None:
    """Raise UserError if a full sequence would have no masked token."""
    if round(masking_rate * (sequence_length - 3)) < 1:
        raise UserError(
            f"corpus.masking_rate {masking_rate:g} masks no token of a sequence of {sequence_length}; "
            f"raise it or corpus.sequence_length."
        )


def _masked(sequences: Sequences, masker: Masker, keys: np.ndarray, rates: np.ndarray | float) -> Batch:
    highest = int(sequences.input_ids.max(initial=0))
    if highest >= masker.vocab_size:  # of large files, opening them has looked at some places only
        raise RunFailed(
            f"The prepared data hold the token {highest:,}, beyond the {masker.vocab_size:,} of their vocabulary; "
            f"they are damaged: run prepare_data.py --verify on their folder."
        )
    masked = masker.mask(sequences.input_ids, keys, rates)
    optional = (sequences.token_type_ids, sequences.next_sentence_labels, sequences.cu_seqlens)
    token_type_ids, next_sentence_labels, cu_seqlens = (
        None if array is None else torch.from_numpy(array) for array in optional
    )
    return Batch(
        input_ids=torch.from_numpy(masked.input_ids),
        masked_positions=torch.from_numpy(masked.positions),
        labels=torch.from_numpy(masked.labels),
        is_mask=torch.from_numpy(masked.is_mask),
        token_type_ids=token_type_ids,
        next_sentence_labels=next_sentence_labels,
        cu_seqlens=cu_seqlens,
        max_seqlen=None if cu_seqlens is None else int(cu_seqlens.diff().max()),
    )
