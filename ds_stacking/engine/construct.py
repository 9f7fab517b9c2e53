"""Construction of a model that is too large for one rank: layer by layer, each shared out among the ranks at once.

DeepSpeed partitions a model under ZeRO 3 when the engine is built, and needs it whole in every rank's memory until
then. Its `zero.Init` context partitions earlier, but draws weights in the working precision and patches torch's
constructors meanwhile, so that the weights of a seed would differ from those under other ZeRO stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import deepspeed
import torch
from torch import nn


def construct_partitioned(build: Callable[[], nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """The model that `build` makes, in the configured precision, its parameters partitioned for ZeRO 3. Collective.

    No more than one module's own parameters are whole at any time. `build` runs on the meta device; then every module
    fills its parameters by `reset_parameters`, in the order in which a construction would, so that the same seed gives
    the same weights to the bit.
    """
    with torch.device("meta"):
        model = build()
    assert not any(buffer.is_meta for buffer in model.buffers()), "a buffer's content would be lost"
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    converted: list[Any] = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        module.to_empty(device="cpu", recurse=False)
        cast(Any, module).reset_parameters()
        own = list(module.parameters(recurse=False))
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        if converted:
            converted[0].convert_to_zero_parameters(param_list=own)
        else:  # the first module's parameters carry the configuration to all others
            deepspeed.zero.Init(module=_OwnParameters(own), config_dict_or_path=dict(config))
        converted += own
    return model


class _OwnParameters(nn.Module):
    """Parameters of a module without those of its children, which are not filled yet."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)
