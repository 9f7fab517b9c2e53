"""Which class of `Bert` runs where: the plain one, or its twin on the fused kernels."""

from __future__ import annotations

import torch

from ds_stacking.models.bert import Bert


def bert_class(fused: bool) -> type[Bert]:
    """`Bert`, or its twin on the fused kernels, whose import takes seconds: only a model that uses them pays."""
    if not fused:
        return Bert
    from ds_stacking.models.fused import FusedBert

    return FusedBert


def has_kernels(device: torch.device) -> bool:
    """Whether `device` runs the fused kernels themselves rather than their references: NVIDIA from Ampere, MI300."""
    if device.type != "cuda":
        return False
    from ds_stacking.kernels import runs_kernels

    return runs_kernels(torch.empty(0, device=device))


def multiplies_fp8(device: torch.device) -> bool:
    """Whether `device` multiplies these formats: NVIDIA from compute capability 8.9 (Ada, Hopper)."""
    cuda = device.type == "cuda" and torch.version.hip is None  # AMD's MI300 has formats of its own
    return cuda and torch.cuda.get_device_capability(device) >= (8, 9)
