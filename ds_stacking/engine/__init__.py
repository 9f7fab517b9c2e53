"""The only room that imports deepspeed: engines, their ZeRO state by parameter name, and the stage manager."""

from __future__ import annotations

from ds_stacking.common.errors import UserError

try:
    import deepspeed  # noqa: F401 (it looks for the accelerator, and for what that one needs)
except (ValueError, AssertionError) as error:
    raise UserError(f"DeepSpeed does not start: {error}; unset or correct DS_ACCELERATOR.") from None
