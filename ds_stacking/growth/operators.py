"""Growth operators: pure functions from two depths to a layer map, and the notation in which a user names them.

A layer map lists, for every block of the grown model, the block of the shallow model that it is copied from; None
stands for a fresh block. The first block that names a source is the *original*, the others are its *copies*.

    stack                         one of OPERATORS
    interleave[1:-1]              the same, with the first and the last block left alone (a slice of the blocks)
    0,1,2,2,1,0                   an explicit layer map; * is a fresh block
    stack+zero_output+noise:0.01  with modifiers of the copies, and zero_output of fresh blocks too (transforms.py)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import nearest, shown
from ds_stacking.growth.transforms import COPY, Transform, parse_modifiers

LayerMap = tuple[int | None, ...]
DEEPEST = 100_000
"""Blocks of a model, at most: a map of more would fill the memory before anything is refused."""
LARGEST = 1e6
"""Factors of a modifier, at most."""


def stack(source: int, target: int) -> LayerMap:
    """ABAB: the whole model on top of itself (Gong et al., ICML 2019, section 3; G_stack of Du et al. 2024)."""
    _require_multiple("stack", source, target)
    return tuple(range(source)) * (target // source)


def interleave(source: int, target: int) -> LayerMap:
    """AABB: every block beside its copies (Chang et al. 2018; "interposition" in orthogonal growth, 2510.08008)."""
    _require_multiple("interleave", source, target)
    return tuple(layer for layer in range(source) for _ in range(target // source))


def middle(source: int, target: int) -> LayerMap:
    """A run of blocks in the middle, twice in a row: 0 1 2 1' 2' 3 (MIDAS of Saunshi et al., NeurIPS 2024).

    Reaches every depth; where that more than doubles the model, it doubles first and then goes on from there.
    """
    return _repeat_run(source, target, lambda depth, run: (depth - run) // 2)


def last(source: int, target: int) -> LayerMap:
    """The topmost blocks once more on top: 0 1 2 3 2' 3' (MSLT of Yang et al. 2020; Reddi et al. 2023).

    Reaches every depth; where that more than doubles the model, it doubles first and then goes on from there.
    """
    return _repeat_run(source, target, lambda depth, run: depth - run)


def fresh(source: int, target: int) -> LayerMap:
    """New blocks with their own initialisation on top ("random" in Bu 2025, 2511.04981)."""
    return (*range(source), *(None for _ in range(target - source)))


OPERATORS: dict[str, Callable[[int, int], LayerMap]] = {
    "stack": stack,
    "interleave": interleave,
    "middle": middle,
    "last": last,
    "fresh": fresh,
}


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator as its notation names it."""

    name: str
    """One of OPERATORS, or an explicit layer map."""
    start: int | None = None
    """First block that it works on, counted as in a slice; the ones before are left alone."""
    stop: int | None = None
    """One past the last block that it works on."""
    transform: Transform = COPY
    """What becomes of the weights of the copies."""


def parse_operator(text: str) -> Operator:
    """Read the notation above; raises UserError for an unknown operator or modifier, naming the nearest known one."""
    base, *modifiers = text.split("+")
    match = re.fullmatch(r"([^\[\]]*)(?:\[(-?[0-9]{0,6}):(-?[0-9]{0,6})\])?", base)
    name = match[1].strip() if match else base
    explicit = re.fullmatch(r"([0-9]{1,6}|\*)(\s*,\s*([0-9]{1,6}|\*))*", name)
    if not match or not (explicit or name in OPERATORS):
        if not match and base.partition("[")[0].strip() in OPERATORS:
            raise UserError(f"operator {shown(text)} has wrong bounds; write for example stack[1:-1].")
        hint = nearest(name.partition("[")[0].strip(), OPERATORS)
        listed = "" if hint.endswith("?") else " Or list the blocks: 0,1,0."
        raise UserError(f"operator {shown(text)} is unknown; {hint}{listed}")
    if explicit and match[2] is not None:
        raise UserError(f"operator {shown(text)} limits an explicit list of blocks; write the whole list instead.")
    start, stop = (_bound(text, bound) for bound in match.groups()[1:3])
    transform = parse_modifiers(modifiers)
    if not all(math.isfinite(factor) and factor <= LARGEST for factor in (transform.scale, transform.noise)):
        raise UserError(f"operator {shown(text)}: scale and noise must be at most {LARGEST:,.0f}; give less.")
    return Operator(name=name, start=start, stop=stop, transform=transform)


def _bound(text: str, bound: str | None) -> int | None:
    if bound == "-":
        raise UserError(f"operator {shown(text)}: '-' is no bound; write for example stack[1:-1].")
    return int(bound) if bound else None


def layer_map(operator: str, source: int, target: int) -> LayerMap:
    """The layer map of `operator` from `source` to `target` blocks.

    Raises UserError for an unknown operator, for a depth that it cannot reach, and for modifiers of copies where it
    makes none.
    """
    parsed = parse_operator(operator)
    if target > DEEPEST:
        raise UserError(f"Growth to {target:,} layers: a model has at most {DEEPEST:,} of them; give fewer.")
    if target < source:
        raise UserError(f"Growth from {source} to {target} layers would shrink the model; order the stages by depth.")
    layers = _grown(parsed, operator, source, target)
    copies = len(layers) - layers.count(None) - len(originals(layers))
    if target > source and not copies and (parsed.transform.noise or parsed.transform.scale not in (0, 1)):
        raise UserError(f"operator {shown(operator)} copies no block, so scale and noise do nothing; leave them out.")
    return layers


def _grown(parsed: Operator, operator: str, source: int, target: int) -> LayerMap:
    if parsed.name not in OPERATORS:
        return _explicit(parsed.name, source, target)
    blocks = range(source)
    inner = blocks[parsed.start : parsed.stop]
    if not inner:
        raise UserError(f"operator {shown(operator)} leaves all {source} blocks alone; widen its bounds.")
    grown = OPERATORS[parsed.name](len(inner), target - source + len(inner))
    moved = (None if layer is None else inner[layer] for layer in grown)
    return (*blocks[: inner.start], *moved, *blocks[inner.stop :])


def originals(layers: LayerMap) -> frozenset[int]:
    """Positions in the grown model whose block is the original of its source, not a copy."""
    seen: dict[int, int] = {}
    for position, source in enumerate(layers):
        if source is not None:
            seen.setdefault(source, position)
    return frozenset(seen.values())


def _repeat_run(source: int, target: int, start: Callable[[int, int], int]) -> LayerMap:
    """Repeat a run of blocks that begins at `start(depth, length of the run)` until there are `target`."""
    layers = tuple(range(source))
    while len(layers) < target:
        run = min(len(layers), target - len(layers))
        end = start(len(layers), run) + run
        layers = layers[:end] + layers[end - run :]
    return layers


def _explicit(text: str, source: int, target: int) -> LayerMap:
    layers = tuple(None if item.strip() == "*" else int(item) for item in text.split(","))
    if len(layers) != target:
        raise UserError(
            f"operator {shown(text)} lists {len(layers):,} blocks, but the grown model has {target}; list each."
        )
    unknown = [layer for layer in layers if layer is not None and layer >= source]
    if unknown:
        raise UserError(
            f"operator {shown(text)} names block {unknown[0]}, but the model has blocks 0 to {source - 1}."
        )
    return layers


def _require_multiple(operator: str, source: int, target: int) -> None:
    if target % source:
        nearest = max(1, round(target / source)) * source
        raise UserError(
            f"Growth from {source} to {target} layers: {target} is not a multiple of {source}, as {operator} needs; "
            f"{nearest} is, or use middle or last."
        )
