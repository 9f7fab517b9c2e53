"""The whole model on one rank: fp32 masters gathered from all ranks, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_stacking.engine.factory import device
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.plan import ParameterInfo, copy_plan
from ds_stacking.growth.state import FullState


def consolidate(engine: DeepSpeedEngine, parameters: Mapping[str, ParameterInfo]) -> dict[str, Tensor] | None:
    """The masters as full fp32 tensors on the host of rank 0; None elsewhere. All ranks call it together."""
    plan = copy_plan(parameters, find_blocks(engine.module))
    holder = torch.distributed.get_rank() == 0
    full = FullState({name: info.numel for name, info in parameters.items()}, kinds=("master",), holder=holder)
    execute(plan, LiveState(engine), full, make_exchange(device()), kinds=("master",))
    if not holder:
        return None
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    return {name: tensor.view(shapes[name]) for name, tensor in full.tensors["master"].items()}
