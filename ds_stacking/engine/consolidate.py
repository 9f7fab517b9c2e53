"""The model for a rank that writes it down: fp32 masters gathered from all ranks, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from ds_stacking.engine.factory import device
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.executor import execute
from ds_stacking.growth.plan import ParameterInfo, copy_plan
from ds_stacking.growth.state import FullState


def gather_masters(engine: DeepSpeedEngine, parameters: Mapping[str, ParameterInfo]) -> Iterator[tuple[str, Tensor]]:
    """The masters as full fp32 tensors on the host of rank 0, in the order of `parameters`; nothing on other ranks.

    Collective: every rank goes through to the end. Rank 0 holds a block, or one tensor outside the blocks, at a time.
    """
    plan = copy_plan(parameters, find_blocks(engine.module))
    state, exchange = LiveState(engine), make_exchange(device())
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    for _, group in groupby(plan.entries, key=lambda entry: entry.target if entry.block is None else entry.block):
        part = replace(plan, entries=tuple(group))
        numels = {entry.target: entry.info.numel for entry in part.entries}
        full = FullState(numels, kinds=("master",), holder=exchange.rank == 0)
        execute(part, state, full, exchange, kinds=("master",))
        for name, tensor in full.tensors["master"].items():
            yield name, tensor.view(shapes[name])
