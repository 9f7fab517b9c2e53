"""Growth in live engines against full tensors grown by hand, to the bit: every ZeRO stage on 1, 2, 3 and 4 ranks.

The tiny model is 30 wide, so none of these world sizes divides all of its tensors.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from ds_stacking.engine import handover
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth import operators
from ds_stacking.growth.state import KINDS
from tests.engine.tiny import SEED, factory, replaced, spec
from tests.growth.oracle import State, differing, grow_by_hand
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEP = 17
OPERATOR, LAYERS, POLICY = "interleave", (0, 0, 1, 1), "scale:0.3"
LAYOUTS = [(stage, False, bf16) for stage in range(4) for bf16 in (False, True)]
LAYOUTS += [(stage, True, False) for stage in (1, 2, 3)]
FEW = [(0, False, False), (1, False, True), (2, True, False), (3, False, True)]
"""Enough for the other world sizes: what differs there is how tensors are cut."""

Pieces = list[tuple[str, str, int, np.ndarray]]
"""Kind, name, first element, values: what one rank holds."""


def source_values(kind: str, name: str, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
    return torch.randn(numel, generator=generator)


def fill(manager: StageManager) -> None:
    """Give the engine a state that everybody knows."""
    state = LiveState(manager.engine)
    for piece in state.slices():
        for kind in KINDS:
            values = source_values(kind, piece.name, manager.parameters[piece.name].numel)
            state.write(piece, kind, values[piece.start : piece.stop])
    state.commit(dict.fromkeys(manager.parameters, STEP))


def held(manager: StageManager) -> tuple[Pieces, dict[str, int], bool]:
    """This rank's state, all step counts, and whether its working copies equal the cast masters."""
    state = LiveState(manager.engine)
    pieces = [
        (kind, piece.name, piece.start, state.read(piece, kind).cpu().numpy().copy())
        for piece in state.slices()
        for kind in KINDS
    ]
    fresh = True
    if manager.engine.zero_optimization_stage() < 3:
        working = dict(manager.engine.module.named_parameters())
        for piece in state.slices():
            copy = working[piece.name].detach().flatten()[piece.start : piece.stop]
            fresh &= torch.equal(copy, state.read(piece, "master").to(copy.dtype))
    return pieces, state.steps(), fresh


def grow_one(zero_stage: int, offload: bool, bf16: bool, to_zero: int | None = None) -> tuple:
    manager = StageManager(factory(zero_stage, offload=offload, bf16=bf16), seed=SEED)
    manager.start(spec(2))
    fill(manager)
    names = {name: info.numel for name, info in manager.parameters.items()}
    grown = spec(4)
    if to_zero is not None:
        grown = type(grown)(**{**vars(grown), "zero_stage": to_zero})
    manager.grow(grown, operator=OPERATOR, optimizer_state=POLICY)
    result = *held(manager), names
    manager.close()
    return result


def grow_all(world_size: int) -> dict:
    results = {layout: grow_one(*layout) for layout in (LAYOUTS if world_size == 2 else FEW)}
    if world_size == 2:
        results |= {(a, False, True, b): grow_one(a, False, True, b) for a, b in ((0, 3), (3, 1), (2, 0))}
        original = operators.OPERATORS[OPERATOR]
        operators.OPERATORS[OPERATOR] = lambda a, b: (*original(a, b)[1:], 0)
        results["layer map off by one"] = grow_one(1, False, False)
        operators.OPERATORS[OPERATOR] = original
        with (
            replaced(LiveState, "commit", lambda self, steps: None),
            replaced(handover, "verify_working_copies", lambda state, exchange: None),
        ):
            results["no commit"] = grow_one(1, False, True)
    return results


def assembled(ranks: list[Pieces], expected: State) -> State:
    found = {kind: {name: torch.full_like(v, float("nan")) for name, v in expected[kind].items()} for kind in expected}
    for kind, name, start, values in (piece for pieces in ranks for piece in pieces):
        found[kind][name][start : start + len(values)] = torch.from_numpy(values)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_gives_the_bits_of_the_oracle(world_size: int) -> None:
    ranks = run_ranks(world_size, grow_all, world_size)
    names = ranks[0][FEW[0]][3]
    state = {kind: {name: source_values(kind, name, numel) for name, numel in names.items()} for kind in KINDS}
    expected, steps = grow_by_hand(state, dict.fromkeys(names, STEP), LAYERS, POLICY)
    for layout in ranks[0]:
        found = assembled([rank[layout][0] for rank in ranks], expected)
        right = not differing(found, expected)
        if layout == "layer map off by one":
            assert not right
        elif layout == "no commit":
            assert right and not all(rank[layout][2] for rank in ranks)
            assert ranks[0][layout][1] != steps
        else:
            assert right, (layout, differing(found, expected)[:3])
            assert all(rank[layout][1] == steps and rank[layout][2] for rank in ranks), layout
