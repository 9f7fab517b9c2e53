"""The parameter groups of a grown engine as plain values, to build the same groups in a process that never grew.

DeepSpeed's own `load_checkpoint` needs an engine with the groups of the one that was saved, and a growth adds groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_stacking.common.errors import UserError
from ds_stacking.engine.zero_state import LiveState


def describe_groups(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, with names of parameters in "params": JSON, the same on every rank."""
    state = LiveState(engine)
    groups: list[dict[str, Any]] = [
        {name: _plain(value) for name, value in group.items() if name != "params"} | {"params": []}
        for group in state.base.param_groups
    ]
    for name, fragment in state.fragments.items():
        groups[fragment.group]["params"].append(name)
    return groups


def make_groups(model: nn.Module, description: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups of `describe_groups` over the parameters of `model`, for an optimizer.

    Raises UserError where the description and the model name different parameters.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    described = [name for group in description for name in group["params"]]
    differing = sorted(parameters.keys() ^ set(described))
    if differing:
        raise UserError(
            f"The description of the groups and the model differ in {len(differing)} parameters, such as "
            f"{differing[0]}; build the model with as many blocks as the saved one had."
        )
    return [{**group, "params": [parameters[name] for name in group["params"]]} for group in description]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
