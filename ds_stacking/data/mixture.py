"""Mixtures: samples from several prepared folders in fixed proportions, in constant time for any sample."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_stacking.common.errors import UserError
from ds_stacking.data.token_file import Split

_PERIOD = 10_000
"""Samples after which the pattern of sources repeats; shares are exact to one in so many."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One split of several sources."""

    splits: Sequence[Split]
    """The sources."""
    weights: Sequence[float]
    """Their shares of the samples, up to a common factor."""

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    @classmethod
    def of(cls, data: Split | Mixture) -> Mixture:
        """A split as a mixture of one."""
        return data if isinstance(data, Mixture) else cls(splits=[data], weights=[1.0])


class Interleaving:
    """Which source a sample comes from, and the how manyth of that source it is.

    Any stretch of samples holds each source in its share, as evenly as whole numbers allow.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, np.float64) / math.fsum(weights)
        if len(shares) == 1:
            self.counts = np.ones(1, np.int64)
        else:
            self.counts = np.floor(shares * _PERIOD).astype(np.int64)
            most_missed = np.argsort(self.counts - shares * _PERIOD, kind="stable")
            self.counts[most_missed[: _PERIOD - self.counts.sum()]] += 1
        sources = np.repeat(np.arange(len(shares)), self.counts)
        numbers = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((numbers + 0.5) / self.counts[sources], kind="stable")
        self._sources, self._numbers = sources[order], numbers[order]

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source and number inside it of every sample, [B] int64 each."""
        periods, places = np.divmod(samples, len(self._sources))
        sources = self._sources[places]
        return sources, periods * self.counts[sources] + self._numbers[places]


def is_mixture(source: str) -> bool:
    """Whether a data source is a mixture's file."""
    return source.endswith(".json") and Path(source).expanduser().is_file()


def read_mixture(path: Path) -> dict[Path, float]:
    """Read `{"folder": weight, ...}`, folders relative to the file; UserError if it is anything else."""
    form = f'The mixture {path} must be a JSON object such as {{"wikipedia": 3, "books": 1}}, folders and weights'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{form}; it cannot be read ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{form}.")
    for name, weight in content.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"{form} above 0; {name!r} has {json.dumps(weight)}.")
    smallest = min(content.values()) / math.fsum(content.values())
    if smallest * _PERIOD < 1:
        raise UserError(f"{form}; a share of less than one in {_PERIOD:,} samples is too small.")
    return {(path.parent / name).resolve(): float(weight) for name, weight in content.items()}
