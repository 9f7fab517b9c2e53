"""What is checked before a growth touches anything: that plan and stores fit, and that the state is finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_stacking.common.errors import UserError
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.holdings import Holdings
from ds_stacking.growth.plan import GrowthPlan
from ds_stacking.growth.state import KINDS, Kind, StateReader, TensorSlice


def check_source(plan: GrowthPlan, held: Holdings) -> None:
    """Raise UserError where the source lacks a tensor of the plan, or has it in another size."""
    sizes = held.sizes
    for entry in plan.entries:
        if entry.source is not None:
            _check_size("The state to be grown", entry.source, entry.info.numel, sizes)


def check_target(plan: GrowthPlan, held: Holdings) -> None:
    """Raise UserError where the grown model lacks a tensor of the plan, or has it in another size."""
    sizes = held.sizes
    for entry in plan.entries:
        _check_size("The grown model", entry.target, entry.info.numel, sizes)


def _check_size(what: str, name: str, numel: int, sizes: Mapping[str, int]) -> None:
    if name not in sizes:
        raise UserError(f"{what} has no tensor {name}, which the plan names; make the plan from this very model.")
    if sizes[name] != numel:
        raise UserError(
            f"{what} has tensor {name} with {sizes[name]:,} elements, but the plan says {numel:,}: another "
            f"architecture; make the plan from this very model."
        )


def check_finite(reader: StateReader, exchange: Exchange, *, kinds: Sequence[Kind] = KINDS) -> None:
    """Raise UserError, on every rank, where a weight or a moment is NaN or infinite. All ranks call it together."""
    bad = [(piece, kind) for piece in reader.slices() for kind in kinds if not _finite(reader, piece, kind)]
    if exchange.all_reduce_sum(len(bad)):
        where = ", ".join(dict.fromkeys(f"{piece.name} ({kind})" for piece, kind in bad[:3])) or "on another rank"
        raise UserError(
            f"The state to be grown holds NaN or infinite numbers: {where}; go back to a checkpoint before they arose."
        )


def _finite(reader: StateReader, piece: TensorSlice, kind: Kind) -> bool:
    """A finite sum has finite terms, and costs one pass; only a sum that is not finite needs a closer look."""
    values = reader.read(piece, kind)
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
