"""Finding a model's blocks by their container, whatever the model calls it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ds_stacking.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BlockNames:
    """The container of a model's blocks and how the names of their parameters are made."""

    prefix: str
    """Name of the container, such as `blocks` or `transformer.h`."""
    count: int
    """Number of blocks."""

    def split(self, name: str) -> tuple[int, str] | None:
        """`blocks.3.attention.out.weight` -> (3, `attention.out.weight`); None for a parameter outside the blocks."""
        match = re.fullmatch(re.escape(self.prefix) + r"\.(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def join(self, index: int, rest: str) -> str:
        """The inverse of `split`."""
        return f"{self.prefix}.{index}.{rest}"


def find_blocks(module: nn.Module) -> BlockNames:
    """The container that holds most of the model's parameters in blocks of equal shape.

    Raises UserError where no nn.ModuleList qualifies.
    """
    best: tuple[int, BlockNames] | None = None
    for prefix, container in module.named_modules():
        if not isinstance(container, nn.ModuleList) or len(container) == 0:
            continue
        signatures = [_signature(block) for block in container]
        if any(signature != signatures[0] for signature in signatures) or not signatures[0]:
            continue
        size = sum(_numel(parameter) for parameter in container.parameters())
        if best is None or size > best[0]:
            best = (size, BlockNames(prefix=prefix, count=len(container)))
    if best is None:
        raise UserError(
            f"{type(module).__name__} has no nn.ModuleList of blocks with equal parameters; growth needs one."
        )
    return best[1]


def find_block_names(shapes: Mapping[str, Sequence[int]]) -> BlockNames:
    """The same for a state known only by its tensors' names and shapes, such as a Hugging Face folder."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        for at in range(1, len(parts) - 1):
            if parts[at].isdecimal():
                blocks = found.setdefault(".".join(parts[:at]), {})
                blocks.setdefault(int(parts[at]), {})[".".join(parts[at + 1 :])] = tuple(shape)
    alike = {
        prefix: len(blocks) * sum(math.prod(shape) for shape in blocks[0].values())
        for prefix, blocks in found.items()
        if sorted(blocks) == list(range(len(blocks))) and all(block == blocks[0] for block in blocks.values())
    }
    if not alike:
        raise UserError("No tensors are named as those of blocks with equal parameters (blocks.0.x, blocks.1.x, ...).")
    prefix = max(alike, key=lambda prefix: alike[prefix])
    return BlockNames(prefix=prefix, count=len(found[prefix]))


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the full parameter; ZeRO-3 leaves an empty tensor behind and keeps the number in `ds_numel`."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _signature(block: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in block.named_parameters()]
