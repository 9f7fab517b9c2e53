"""Mixtures: samples from several prepared folders in fixed proportions, in constant time for any sample."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from ds_stacking.common.errors import UserError, require
from ds_stacking.common.json_files import Finite, parse_json
from ds_stacking.common.own_files import read_named
from ds_stacking.data.names import first_line, named_path
from ds_stacking.data.token_file import Split

Weight = Annotated[Finite, Field(gt=0, le=1e12)]
_LARGEST_FILE = 2**20
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
    return source.endswith(".json") and os.path.isfile(named_path(source))


def read_mixture(path: Path) -> dict[Path, float]:
    """Read `{"folder": weight, ...}`, folders relative to the file; UserError if it is anything else."""
    form = 'it must be a JSON object of folders and weights, such as {"wikipedia": 3, "books": 1}'
    try:
        content = read_named(path, limit=_LARGEST_FILE)
    except OSError as error:
        raise UserError(f"The mixture {path} cannot be read ({error.strerror}); {form}.") from error
    weights = parse_json(content, dict[str, Weight], where=f"The mixture {path}", mend=form)
    require(weights, f"The mixture {path} is empty; {form}.")
    smallest = min(weights.values()) / math.fsum(weights.values())
    require(
        smallest * _PERIOD >= 1, f"The mixture {path} has a share of less than one in {_PERIOD:,} samples; raise it."
    )
    folders: dict[Path, float] = {}
    for name, weight in json.loads(content, object_pairs_hook=list):
        try:
            folder = (path.parent / named_path(name)).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"The mixture {path} names {name!r}, no folder ({first_line(error)}).") from None
        require(folder not in folders, f"The mixture {path} names {name!r} twice; keep one.")
        folders[folder] = float(weight)
    return folders
