"""The growth plan: for every tensor of the grown model, where its weights and its optimizer state come from.

A plan holds names and numbers only. It can be printed, saved as JSON and applied to live engines, checkpoints and
Hugging Face folders by the one executor (`executor.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.growth.blocks import BlockNames
from ds_stacking.growth.operators import LayerMap, layer_map, originals, parse_operator
from ds_stacking.growth.policies import FRESH, StateRule, parse_policy
from ds_stacking.growth.transforms import COPY, OUTPUT_PROJECTION, ZEROS, Transform


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What a plan must know of a parameter."""

    numel: int
    """Elements of the full tensor."""
    decay: bool
    """Whether weight decay applies."""
    birth: int = 0
    """Stage in which the parameter was made."""
    step: int = 0
    """Adam's step count."""

    @property
    def group(self) -> tuple[int, bool, int]:
        """Key of its parameter group. One group has one step count, so the step count is part of the key."""
        return (self.birth, not self.decay, self.step)


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One tensor of the grown model."""

    target: str
    """Its name."""
    source: str | None
    """The tensor that it is made from; None keeps the grown model's own initialisation."""
    info: ParameterInfo
    """Size, parameter group and step count after the growth."""
    state: StateRule
    """What becomes of the source's moments."""
    block: int | None
    """The block of the grown model that it belongs to; None outside the blocks."""
    transform: Transform = COPY
    """What becomes of the source's weights."""


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """A growth from one depth to another."""

    from_layers: int
    to_layers: int
    operator: str
    optimizer_state: str
    layers: LayerMap
    """Source block of each block of the grown model."""
    entries: tuple[PlanEntry, ...]
    """One for each tensor of the grown model, in its order."""

    @property
    def parameters(self) -> dict[str, ParameterInfo]:
        """The grown model's parameters."""
        return {entry.target: entry.info for entry in self.entries}

    def describe(self) -> str:
        """Where each block comes from, at a glance: `0 1 2 | 0' 1' 2'` (a prime marks a copy, * a fresh block)."""
        first = originals(self.layers)
        marks = ["*" if s is None else f"{s}" + ("" if i in first else "'") for i, s in enumerate(self.layers)]
        return (
            f"{self.from_layers} -> {self.to_layers} layers, {self.operator}, "
            f"optimizer state {self.optimizer_state}: {' '.join(marks)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return dataclasses.asdict(self)


def make_plan(
    source: Mapping[str, ParameterInfo],
    blocks: BlockNames,
    layers: LayerMap,
    *,
    operator: str,
    optimizer_state: str,
    stage: int,
    transform: Transform = COPY,
) -> GrowthPlan:
    """The plan that grows `source` into `len(layers)` blocks.

    `source` lists the shallow model's parameters in its order; `stage` numbers the stage that begins, and is the
    birth of copies and fresh blocks; `transform` is done to the weights of copies, and zero_output to those of fresh
    blocks too. Raises UserError where `layers` names a block that is not there, and where the blocks have nothing that
    `transform` could scale.
    """
    unknown = [layer for layer in layers if layer is not None and not 0 <= layer < blocks.count]
    if unknown:
        raise UserError(f"The layer map names block {unknown[0]}, but the model has {blocks.count} blocks.")
    rules = parse_policy(optimizer_state)
    first = originals(layers)
    suffixes = [parts[1] for name in source if (parts := blocks.split(name)) and parts[0] == 0]
    if transform.scale != 1 and not any(OUTPUT_PROJECTION.fullmatch(rest) for rest in suffixes):
        raise UserError(
            f"The blocks have no output projection with a known name ({', '.join(suffixes[:3])}, ...), so zero_output "
            f"and scale have nothing to work on; leave them out."
        )

    def entry(
        name: str | None, target: str, info: ParameterInfo, rule: StateRule, block: int | None, what: Transform = COPY
    ) -> PlanEntry:
        info = dataclasses.replace(info, step=info.step if rule.keep_step else 0)
        return PlanEntry(target=target, source=name, info=info, state=rule, block=block, transform=what)

    def grown_block(position: int) -> Iterator[PlanEntry]:
        layer = layers[position]
        for rest in suffixes:
            target = blocks.join(position, rest)
            name = blocks.join(layer or 0, rest)
            if position in first:
                yield entry(name, target, source[name], rules.original, position)
            else:
                born = dataclasses.replace(source[name], birth=stage)
                if layer is None:
                    # zeros need no source of their own: those of block 0, times 0
                    zeroed = transform.of(rest).scale == 0
                    yield entry(name if zeroed else None, target, born, FRESH, position, ZEROS if zeroed else COPY)
                else:
                    yield entry(name, target, born, rules.copy, position, transform.of(rest))

    entries: list[PlanEntry] = []
    for name in source:
        parts = blocks.split(name)
        if parts is None:
            entries.append(entry(name, name, source[name], rules.original, None))
        elif parts == (0, suffixes[0]):
            entries += [made for position in range(len(layers)) for made in grown_block(position)]
    return GrowthPlan(
        from_layers=blocks.count,
        to_layers=len(layers),
        operator=operator,
        optimizer_state=optimizer_state,
        layers=layers,
        entries=tuple(entries),
    )


def plan_growth(
    source: Mapping[str, ParameterInfo],
    blocks: BlockNames,
    layers: int,
    operator: str,
    optimizer_state: str,
    stage: int,
) -> GrowthPlan:
    """The plan by which `operator` grows `source` to so many blocks. Raises what layer_map and make_plan raise."""
    mapping, transform = layer_map(operator, blocks.count, layers), parse_operator(operator).transform
    return make_plan(
        source, blocks, mapping, operator=operator, optimizer_state=optimizer_state, stage=stage, transform=transform
    )


def copy_plan(parameters: Mapping[str, ParameterInfo], blocks: BlockNames) -> GrowthPlan:
    """The plan that moves a model as it is, optimizer state included, from one store to another."""
    layers = tuple(range(blocks.count))
    return make_plan(parameters, blocks, layers, operator="copy", optimizer_state="stack", stage=0)


def parameter_groups(parameters: Mapping[str, ParameterInfo]) -> list[tuple[tuple[int, bool, int], Sequence[str]]]:
    """Names by parameter group, oldest first, decayed before undecayed: one group per (birth, decay, step count)."""
    groups: dict[tuple[int, bool, int], list[str]] = {}
    for name, info in parameters.items():
        groups.setdefault(info.group, []).append(name)
    return sorted(groups.items())
