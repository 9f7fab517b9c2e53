"""Growth of any DeepSpeed engine, in a training loop that knows nothing else of this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from ds_stacking.common.errors import UserError
from ds_stacking.common.generators import isolated_generators
from ds_stacking.engine.growable import check_growable
from ds_stacking.engine.handover import hand_over
from ds_stacking.engine.record import GrowthRecord, growth_record
from ds_stacking.engine.release import release
from ds_stacking.engine.zero_state import LiveState, parameter_numels
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.blocks_alike import check_alike
from ds_stacking.growth.operators import layer_map, parse_operator
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, make_plan

Groups = Callable[[nn.Module], list[dict[str, Any]]]
BuildEngine = Callable[[int, Groups], DeepSpeedEngine]


def grow_engine(
    engine: DeepSpeedEngine,
    build: BuildEngine,
    layers: int,
    *,
    operator: str = "stack",
    optimizer_state: str = "stack",
    seed: int = 0,
) -> tuple[DeepSpeedEngine, GrowthRecord]:
    """Grow `engine` to `layers` blocks; returns the new engine and what was done. `engine` is an empty shell then.

    `build(layers, groups)` makes the model of that depth and calls `deepspeed.initialize` with an optimizer over the
    parameter groups `groups(model)`. These have the options of the old engine's groups; copied and fresh blocks are in
    groups of their own, whose "birth" numbers the growth that made them, since one group has one step count.

    All ranks call it together, between optimizer steps. The weights of fresh blocks are drawn from `seed`; no random
    number generator moves. Raises UserError for an engine that cannot be grown (growable.py), a depth that the
    operator cannot reach, blocks that do something else than their sources, frozen parameters and a state that is not
    finite, and RuntimeError where the new state differs from the old; `engine` is then as it was.
    """
    check_growable(engine, "The engine")
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise UserError("The engine is in the middle of an optimizer step; grow it after engine.step() has updated.")
    origin = _Origin(engine)
    stage = 1 + max(info.birth for info in origin.infos.values())
    plan = make_plan(
        origin.infos,
        origin.blocks,
        layer_map(operator, origin.blocks.count, layers),
        operator=operator,
        optimizer_state=optimizer_state,
        stage=stage,
        transform=parse_operator(operator).transform,
    )

    def build_checked() -> DeepSpeedEngine:
        with isolated_generators(seed):
            new = build(layers, lambda model: origin.groups(model, plan))
        try:
            check_growable(new, "The engine that `build` made")
            check_alike(engine.module, new.module, origin.blocks, plan.layers)
        except UserError:
            release(new)
            raise
        return new

    handover = hand_over(engine, plan, build_checked)
    return handover.engine, growth_record(plan, handover, stage=stage)


class _Origin:
    """What must be known of the old engine to group the grown model's parameters; holds none of its tensors."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        state = LiveState(engine)
        self.blocks = find_blocks(engine.module)
        self.options = [
            {name: value for name, value in group.items() if name != "params"} for group in state.base.param_groups
        ]
        self.group_of = {name: fragment.group for name, fragment in state.fragments.items()}
        steps = state.steps()
        self.infos = {
            name: self._info(name, numel, steps[name]) for name, numel in parameter_numels(engine.module).items()
        }

    def _info(self, name: str, numel: int, step: int) -> ParameterInfo:
        options = self.options[self.group_of[name]]
        decay = options.get("weight_decay", 0) > 0
        return ParameterInfo(numel=numel, decay=decay, birth=options.get("birth", 0), step=step)

    def groups(self, model: nn.Module, plan: GrowthPlan) -> list[dict[str, Any]]:
        """One group per (old group, stage of birth, step count), with the old group's options."""
        by_name = dict(model.named_parameters())
        groups: dict[tuple[int, int, int], dict[str, Any]] = {}
        for entry in plan.entries:
            if entry.target not in by_name:
                raise UserError(
                    f"The grown model has no parameter {entry.target}; build it as the old one was, only deeper."
                )
            parts = self.blocks.split(entry.target)
            like = entry.source or self.blocks.join(0, parts[1] if parts else "")
            key = (self.group_of[like], entry.info.birth, entry.info.step)
            empty = {**self.options[key[0]], "birth": entry.info.birth, "params": []}
            groups.setdefault(key, empty)["params"].append(by_name[entry.target])
        return list(groups.values())
