"""Every random number generator of this process as plain JSON values, and back, to the bit; and a seed for a while."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Finite


class _Python(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    version: int
    words: str
    gauss: Finite | None


class _NumPy(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    keys: str
    position: Annotated[int, Field(ge=0, le=624)]
    has_gauss: Literal[0, 1]
    cached_gauss: Finite


class Generators(TypedDict):
    """What `capture_generators` gives; tensors and words as base64."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    python: _Python
    numpy: _NumPy
    torch: str
    cuda: str | None


CUDA_BYTES = 16
"""Size of the state of a CUDA generator: seed and offset."""


def capture_generators() -> Generators:
    """The states of Python's, NumPy's, torch's and the current CUDA device's default generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    assert name == "MT19937", f"NumPy's default generator is {name}"
    states = {
        "python": {"version": version, "words": _encode(np.array(words, dtype="<u4")), "gauss": gauss},
        "numpy": {
            "keys": _encode(np.asarray(keys, dtype="<u4")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached_gauss),
        },
        "torch": _encode(torch.get_rng_state().numpy()),
        "cuda": _encode(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_available() else None,
    }
    return cast(Generators, states)


def restore_generators(states: Generators) -> None:
    """Set all generators as `capture_generators` found them; CUDA's only where there is a device now."""
    random.setstate(_python_state(states["python"]))
    np.random.set_state(_numpy_state(states["numpy"]))
    torch.set_rng_state(_bytes(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


@contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Seed torch inside, and leave every generator as it was outside."""
    states = capture_generators()
    try:
        torch.manual_seed(seed)
        yield
    finally:
        restore_generators(states)


def check_generators(states: Generators, path: Path) -> None:
    """Raise UserError where a generator does not take its state; `path`, whose content they are, is named."""
    trials = {
        "python": lambda: random.Random().setstate(_python_state(states["python"])),
        "numpy": lambda: np.random.RandomState().set_state(_numpy_state(states["numpy"])),
        "torch": lambda: torch.Generator().set_state(_bytes(states["torch"])),
        "cuda": lambda: _check_cuda(states["cuda"]),
    }
    for name, trial in trials.items():
        try:
            trial()
        except (ValueError, TypeError, RuntimeError, IndexError, OverflowError):
            raise UserError(f"{path}: {name} is no state of such a generator; restore that file.") from None


def _check_cuda(state: str | None) -> None:
    if state is not None and len(_bytes(state)) != CUDA_BYTES:
        raise ValueError


def _python_state(python: _Python) -> tuple[int, tuple[int, ...], float | None]:
    return python["version"], tuple(int(word) for word in _decode(python["words"], "<u4")), python["gauss"]


def _numpy_state(numpy: _NumPy) -> tuple[str, np.ndarray, int, int, float]:
    keys = _decode(numpy["keys"], "<u4")
    return "MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype).copy()


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(_decode(text, "u1"))
