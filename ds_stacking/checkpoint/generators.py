"""Every random number generator of this process as plain JSON values, and back, to the bit."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture_generators() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the current CUDA device's default generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    assert name == "MT19937", f"NumPy's default generator is {name}"
    return {
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


def restore_generators(states: dict[str, Any]) -> None:
    """Set all generators as `capture_generators` found them; CUDA's only where there is a device now."""
    python, numpy = states["python"], states["numpy"]
    words = tuple(int(word) for word in _decode(python["words"], "<u4"))
    random.setstate((python["version"], words, python["gauss"]))
    keys = _decode(numpy["keys"], "<u4")
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
    torch.set_rng_state(_bytes(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _decode(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(_decode(text, "u1"))
