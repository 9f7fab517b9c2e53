"""The precision that a run computes in: asked for, or what the hardware multiplies natively."""

from __future__ import annotations

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig
from ds_stacking.engine.factory import device, native_bf16
from ds_stacking.models.variants import multiplies_fp8


def choose_precision(config: RunConfig) -> tuple[bool, str]:
    """Whether weights and activations are bf16, and why. Raises UserError where the device cannot multiply fp8."""
    if config.precision == "auto":
        return native_bf16()
    if config.precision == "fp8" and not multiplies_fp8(device()):
        raise UserError(
            "precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more on every rank, such as an H100; "
            "use --precision bf16 or auto."
        )
    return config.precision != "fp32", "as asked"


def precision_name(config: RunConfig, *, bf16: bool) -> str:
    """The precision that a run is in: fp8, bf16 or fp32."""
    if config.precision == "fp8":
        return "fp8"
    return "bf16" if bf16 else "fp32"
