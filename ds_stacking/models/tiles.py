"""Which tiles the kernels of a fused model need for a batch, and which are fastest: two layers tell for any depth.

The inner and the last block differ, for the last one computes predicted tokens only. Imported where kernels run alone,
since their import takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_stacking.config import ModelConfig
from ds_stacking.kernels.tiles import Compare, environment, measuring, needed, source_digest, use
from ds_stacking.models.fused import FusedBert

__all__ = ["environment", "measure_tiles", "needed_tiles", "source_digest", "use"]

LAYERS = 2
Inputs = Mapping[str, Any]
"""The arguments of `Bert.forward`: tensors, None and numbers."""


def needed_tiles(config: ModelConfig, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What training on such a batch has to choose on `device` and nobody has chosen yet: {key: prediction}.

    Nothing is computed.
    """
    return needed(lambda: _pass(config, inputs, torch.device("meta"), dtype), device)


def measure_tiles(
    config: ModelConfig,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    *,
    found: dict[str, str],
    compare: Compare | None = None,
) -> None:
    """Add the fastest tiles of a forward and backward pass on `device` to `found`, {key: configuration}, one by one.

    Raises torch.OutOfMemoryError.
    """
    with measuring(compare, found):
        _pass(config, inputs, device, dtype)


def _pass(config: ModelConfig, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> None:
    """One forward and backward pass as in training."""
    model = FusedBert(config, LAYERS, initialize=device.type != "meta").to(device, dtype).train()
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    model(**there).loss_sum.backward()
