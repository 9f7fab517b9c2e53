"""Whether a copied block computes what its source computes: parameters can be copied, what a block does cannot.

A model may build its blocks by their place: full attention here, a sliding window there, a scale of 1 / (index + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from ds_stacking.common.errors import UserError
from ds_stacking.growth.blocks import BlockNames
from ds_stacking.growth.operators import LayerMap

Facts = Mapping[str, Any]

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
DEEPSPEED = ("ds_", "applied_pre_backward_ref_cnt")
"""How the attributes begin that DeepSpeed keeps its books in."""


def check_blocks_alike(
    old: nn.Module, new: nn.Module, blocks: BlockNames, layers: LayerMap, *, besides: frozenset[str] = frozenset()
) -> None:
    """Raise UserError where a block of `new` does something else than the block of `old` that it is made from.

    Compared are the classes of a block's parts, their plain attributes, and lists of one entry per block in the
    configuration of the model. An attribute that counts the blocks is their name, and is left out; so are those called
    as `besides` says.
    """
    before, after = _facts(old, blocks.prefix), _facts(new, blocks.prefix)
    counters = _counters([*before, *after], [*range(len(before)), *range(len(after))])
    for position, (source, facts) in enumerate(zip(layers, after, strict=False)):
        if source is None:
            continue
        for name in sorted((before[source].keys() | facts.keys()) - counters):
            if name.rpartition(".")[2] in besides:
                continue
            here, there = facts.get(name), before[source].get(name)
            if here != there:
                raise UserError(
                    f"Block {position} of the grown model cannot take the weights of block {source}: {name} is "
                    f"{here!r} there and {there!r} in its source, so it would compute something else; choose an "
                    f"operator that puts blocks where their kind stands, or build all blocks alike."
                )


def _facts(model: nn.Module, prefix: str) -> list[Facts]:
    """What is known of every block."""
    container = model.get_submodule(prefix)
    assert isinstance(container, nn.ModuleList)
    lists = dict(_per_block(model, prefix, len(container)))
    return [
        dict(_attributes(block)) | {name: entries[index] for name, entries in lists.items()}
        for index, block in enumerate(container)
    ]


def _attributes(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Class and plain attributes of a block's modules, DeepSpeed's own left out."""
    for path, module in block.named_modules():
        where = f"{path}." if path else ""
        yield f"{where}class", type(module).__name__
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE and not name.startswith(DEEPSPEED) and _plain(value):
                yield where + name, value


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype)


def _per_block(model: nn.Module, prefix: str, count: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Lists with one plain entry per block in the configurations of the modules around the blocks."""
    parts = prefix.split(".")
    for depth in range(len(parts)):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if isinstance(value, tuple | list) and len(value) == count and _plain(value):
                yield f"config.{name}", value


def _counters(facts: Sequence[Facts], positions: Sequence[int]) -> set[str]:
    """Names whose value is the block's position plus a constant, in every block."""
    found = set()
    for name, first in facts[0].items():
        if type(first) is int and all(
            type(known.get(name)) is int and known[name] - position == first
            for known, position in zip(facts, positions, strict=True)
        ):
            found.add(name)
    return found
