"""Growth operators: pure functions from two depths to a layer map.

A layer map lists, for every block of the grown model, the block of the shallow model that it is copied from; None
stands for a fresh block. The first block that names a source is the *original*, the others are its *copies*.
"""

from __future__ import annotations

from collections.abc import Callable

from ds_stacking.config import UserError

LayerMap = tuple[int | None, ...]


def stack(source: int, target: int) -> LayerMap:
    """ABAB: the whole model on top of itself (Gong et al., ICML 2019, section 3; G_stack of Du et al. 2024)."""
    _require_multiple("stack", source, target)
    return tuple(range(source)) * (target // source)


def interleave(source: int, target: int) -> LayerMap:
    """AABB: every block beside its copies (Chang et al. 2018; "interposition" in orthogonal growth, 2510.08008)."""
    _require_multiple("interleave", source, target)
    return tuple(layer for layer in range(source) for _ in range(target // source))


OPERATORS: dict[str, Callable[[int, int], LayerMap]] = {"stack": stack, "interleave": interleave}


def layer_map(operator: str, source: int, target: int) -> LayerMap:
    """The layer map of `operator` from `source` to `target` blocks.

    Raises UserError for an unknown operator and for a depth that it cannot reach.
    """
    if operator not in OPERATORS:
        raise UserError(f"operator {operator!r} is unknown; choose one of {', '.join(OPERATORS)}.")
    if target < source:
        raise UserError(f"Growth from {source} to {target} layers would shrink the model; order the stages by depth.")
    return OPERATORS[operator](source, target)


def originals(layers: LayerMap) -> frozenset[int]:
    """Positions in the grown model whose block is the original of its source, not a copy."""
    seen: dict[int, int] = {}
    for position, source in enumerate(layers):
        if source is not None:
            seen.setdefault(source, position)
    return frozenset(seen.values())


def _require_multiple(operator: str, source: int, target: int) -> None:
    if target % source:
        nearest = max(1, round(target / source)) * source
        raise UserError(
            f"Growth from {source} to {target} layers: {target} is not a multiple of {source}, as {operator} needs; "
            f"{nearest} is."
        )
