"""Growth inside live ZeRO engines against training without DeepSpeed, and against itself."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist

from ds_stacking.common.errors import UserError
from ds_stacking.engine import handover, stage_manager, zero_state
from ds_stacking.engine.consolidate import gather_masters
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth import operators
from tests.engine.tiny import SEED, PlainTorch, factory, replaced, spec, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

BEFORE, AFTER = 20, 20
LAYOUTS = [(stage, offload) for stage in range(4) for offload in (False, True) if stage or not offload]
POLICIES = [("stack", "stack"), ("interleave", "stack"), ("stack", "new_reset"), ("stack", "reset")]


def start(zero_stage: int, layers: int = 2, accumulation: int = 1, **options) -> StageManager:
    manager = StageManager(factory(zero_stage, **options), seed=SEED)
    manager.start(spec(layers, accumulation))
    return manager


def grown_losses(
    zero_stage: int, operator: str, policy: str, *, offload: bool = False, fault: str = ""
) -> list[float]:
    """20 steps, a growth from 2 to 4 layers, 20 steps."""
    manager = start(zero_stage, offload=offload)
    losses = train(manager, 0, BEFORE)
    with FAULTS[fault]():
        manager.grow(spec(4), operator=operator, optimizer_state=policy)
    if fault in STATE_FAULTS:
        STATE_FAULTS[fault](LiveState(manager.engine))
    losses += train(manager, BEFORE, AFTER)
    manager.close()
    return losses


@contextmanager
def stale_working_copies():
    with (
        replaced(zero_state, "refresh_working_copies", lambda engine: None),
        replaced(handover, "verify_working_copies", lambda state, exchange: None),
    ):
        yield


@contextmanager
def layer_map_off_by_one():
    with replaced(operators, "stack", None):
        original = operators.OPERATORS["stack"]
        operators.OPERATORS["stack"] = lambda a, b: (*original(a, b)[1:], 0)
        try:
            yield
        finally:
            operators.OPERATORS["stack"] = original


@contextmanager
def generator_not_restored():
    def seed_and_leave(seed: int):
        torch.manual_seed(seed)
        return nullcontext()

    with replaced(stage_manager, "isolated_generators", seed_and_leave):
        yield


def drop_moments(state: LiveState) -> None:
    for piece in state.slices():
        state.read(piece, "exp_avg").zero_()
        state.read(piece, "exp_avg_sq").zero_()


def zero_steps(state: LiveState) -> None:
    state.commit(dict.fromkeys(state.fragments, 0))


FAULTS = {
    "": nullcontext,
    "moments dropped": nullcontext,
    "step count zeroed": nullcontext,
    "working copy stale": stale_working_copies,
    "layer map off by one": layer_map_off_by_one,
}
STATE_FAULTS = {"moments dropped": drop_moments, "step count zeroed": zero_steps}


def against_torch() -> tuple[dict, dict]:
    """Losses of every layout and policy, and of every fault under ZeRO-2."""
    right = {
        ("stack", "stack", *layout): grown_losses(layout[0], "stack", "stack", offload=layout[1]) for layout in LAYOUTS
    }
    right |= {(*pair, 2, False): grown_losses(2, *pair) for pair in POLICIES}
    wrong = {fault: grown_losses(2, "stack", "stack", fault=fault) for fault in FAULTS if fault}
    return right, wrong


def relative(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference; a loss that is not a number differs without bound."""
    differences = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
    return max(math.inf if math.isnan(d) else d for d in differences)


def reference(operator: str, policy: str) -> list[float]:
    plain = PlainTorch(2)
    losses = plain.train(0, BEFORE)
    plain.grow(4, operator, policy)
    return losses + plain.train(BEFORE, AFTER)


@pytest.fixture(scope="module")
def measured() -> tuple[dict, dict]:
    return run_ranks(2, against_torch)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_torch_before_and_after_a_growth(measured, layout) -> None:
    assert relative(measured[0][("stack", "stack", *layout)], reference("stack", "stack")) < 1e-4


@pytest.mark.parametrize("pair", POLICIES)
def test_every_operator_and_policy_does_what_was_done_by_hand(measured, pair) -> None:
    expected = reference(*pair)
    assert expected[0] > expected[BEFORE - 1] > expected[-1], "the model must be learning"
    assert relative(measured[0][(*pair, 2, False)], expected) < 1e-4


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault])
def test_an_injected_fault_is_noticed(measured, fault) -> None:
    losses, expected = measured[1][fault], reference("stack", "stack")
    assert relative(losses[:BEFORE], expected[:BEFORE]) < 1e-4
    assert relative(losses[BEFORE:], expected[BEFORE:]) > 1e-3


def factor_one(zero_stage: int, offload: bool, bf16: bool, fault: bool) -> tuple[list[float], list[float], bool]:
    """The losses of a run with and without a growth by factor 1, and whether all weights end equal to the bit."""
    results = []
    for grows in (False, True):
        manager = start(zero_stage, offload=offload, bf16=bf16, dropout=0.2)
        torch.manual_seed(SEED + dist.get_rank())
        losses = train(manager, 0, 4)
        if grows:
            with ExitStack() as stack:
                if fault:
                    stack.enter_context(generator_not_restored())
                manager.grow(spec(2))
        losses += train(manager, 4, 4)
        results.append((losses, dict(gather_masters(manager.engine, manager.parameters))))
        manager.close()
    (plain, weights), (grown, grown_weights) = results
    assert bool(weights) == (dist.get_rank() == 0)
    equal = all(torch.equal(weights[name], grown_weights[name]) for name in weights)
    return plain, grown, equal


def factor_one_everywhere() -> dict:
    cases = [(stage, False, bf16, False) for stage in range(4) for bf16 in (False, True)]
    return {
        case: factor_one(*case)
        for case in [*cases, (2, True, False, False), (3, True, False, False), (2, False, False, True)]
    }


def test_a_growth_by_factor_one_changes_no_bit() -> None:
    results = run_ranks(2, factor_one_everywhere)[0]
    for (stage, offload, bf16, fault), (plain, grown, equal) in results.items():
        where = f"ZeRO {stage}, offload {offload}, bf16 {bf16}"
        if fault:
            assert plain[:4] == grown[:4] and plain[4:] != grown[4:], "a generator that moved must show"
        elif offload:
            assert relative(grown, plain) < 1e-5, where
        else:
            assert plain == grown and equal, where


def curves(accumulations: tuple[int, ...]) -> dict:
    """Losses through two growths by ZeRO stage and number of micro-batches."""
    results = {}
    for zero_stage in range(4):
        for accumulation in accumulations:
            manager = start(zero_stage, accumulation=accumulation)
            losses = train(manager, 0, 8)
            for i, layers in enumerate((4, 8)):
                manager.grow(spec(layers, accumulation), optimizer_state=("stack", "new_reset")[i])
                losses += train(manager, 8 + 8 * i, 8)
            results[zero_stage, accumulation] = losses
            manager.close()
    return results


@pytest.mark.slow
def test_losses_do_not_depend_on_the_layout() -> None:
    two = run_ranks(2, curves, (1, 3))[0]
    one = run_ranks(1, curves, (1,))[0]
    expected = one[2, 1]
    for where, losses in [*two.items(), *one.items()]:
        assert relative(losses, expected) < 1e-4, where


def refused() -> tuple[str, list[float], list[float]]:
    """A growth that cannot be leaves the engine as it was."""
    manager = start(2)
    losses = train(manager, 0, 3)
    try:
        manager.grow(spec(3))
    except UserError as error:
        message = str(error)
    losses += train(manager, 3, 3)
    manager.close()
    plain = start(2)
    expected = train(plain, 0, 6)
    plain.close()
    return message, losses, expected


def test_a_refused_growth_leaves_the_engine_usable() -> None:
    message, losses, expected = run_ranks(2, refused)[0]
    assert "3 is not a multiple of 2" in message
    assert losses == expected
