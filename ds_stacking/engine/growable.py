"""What is asked of an engine that this library did not build, before a growth touches anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.engine import DeepSpeedEngine

from ds_stacking.common.errors import UserError
from ds_stacking.engine.ds_keys import KEYS, SECTIONS
from ds_stacking.engine.zero_state import base_optimizer

OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
"""Their state is `step`, `exp_avg` and `exp_avg_sq`. Subclasses may keep more: only these very types are taken."""


def check_growable(engine: DeepSpeedEngine, what: str) -> None:
    """Raise UserError, one sentence, where a growth would lose or spoil something; `what` names the engine in it."""
    _check_config(engine._config._param_dict, what)
    _check_optimizer(engine, what)
    if engine._config.scheduler_name is not None:
        raise UserError(
            f"{what} has a scheduler in its DeepSpeed configuration, which would start anew after the growth; "
            f"step a learning-rate schedule of your own."
        )


def _check_config(config: Mapping[str, Any], what: str) -> None:
    for name, value in _leaves(config):
        key = KEYS.get(name)
        if key is None or not key.others or key.idle(value):
            continue
        if key.refused:
            raise UserError(
                f"{what} has {name} in its DeepSpeed configuration, with which it cannot grow: {key.refused}."
            )
        if not key.check(value):
            raise UserError(f"{what} has {name} {value!r}; to be grown it must be {key.values}.")


def _leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Keys that are no section, with their sections before them."""
    for key, value in config.items():
        name = before + key
        if name in SECTIONS and isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _check_optimizer(engine: DeepSpeedEngine, what: str) -> None:
    optimizer = base_optimizer(engine)
    if type(optimizer) not in OPTIMIZERS:
        raise UserError(
            f"{what} has the optimizer {type(optimizer).__name__}, whose state growth does not know; use torch's Adam "
            f"or AdamW, DeepSpeed's FusedAdam or DeepSpeedCPUAdam."
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise UserError(f"{what} has an optimizer with amsgrad, whose largest moments growth would lose; turn it off.")
    if not getattr(optimizer, "fp32_optimizer_states", True):
        raise UserError(f"{what} has an optimizer with 16-bit moments; growth needs fp32_optimizer_states=True.")
