"""The executor on simulated ranks against full tensors grown by hand: any depths, policies, sizes and shardings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stacking.common.errors import UserError
from ds_stacking.growth import executor
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.checks import check_finite
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.executor import digest, execute
from ds_stacking.growth.operators import layer_map
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, make_plan
from ds_stacking.growth.schedule import schedule
from ds_stacking.growth.state import KINDS, FullState, TensorSlice
from tests.growth.oracle import FACTORS, State, differing, grow_by_hand
from tests.growth.simulated import ShardState, ThreadRank, assemble, run_threads

OPERATORS = ("stack", "interleave", "middle", "last", "middle[1:]")


def random_state(layers: int, sizes: list[int], seed: int) -> tuple[State, dict[str, ParameterInfo]]:
    """Two tensors outside the blocks, and in each block one of every size; a step count of its own for each."""
    numels = {"embedding": sizes[0] + 3, "head": 5}
    numels |= {f"blocks.{i}.part{j}.weight": size for i in range(layers) for j, size in enumerate(sizes)}
    generator = torch.Generator().manual_seed(seed)
    state = {kind: {name: torch.randn(n, generator=generator) for name, n in numels.items()} for kind in KINDS}
    infos = {
        name: ParameterInfo(numel=numel, decay=numel % 2 == 0, step=10 + i)
        for i, (name, numel) in enumerate(numels.items())
    }
    return state, infos


def plan_for(infos: dict[str, ParameterInfo], layers: tuple, policy: str = "stack", **options) -> GrowthPlan:
    blocks = find_block_names({name: (info.numel,) for name, info in infos.items()})
    return make_plan(infos, blocks, layers, operator="test", optimizer_state=policy, stage=1, **options)


def cut(draw, numels: dict[str, int], world_size: int, *, doubled: bool = False) -> list[list[TensorSlice]]:
    """Every tensor in pieces at random places, each on a random rank; some ranks may hold nothing."""
    table: list[list[TensorSlice]] = [[] for _ in range(world_size)]
    for name, numel in numels.items():
        places = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=3))})
        for start, stop in zip(places, places[1:], strict=False):
            for rank in {draw(st.integers(0, world_size - 1)) for _ in range(1 + doubled)}:
                table[rank].append(TensorSlice(name, start, stop))
    return table


@st.composite
def growths(draw):
    depth, operator = draw(st.integers(2, 4)), draw(st.sampled_from(OPERATORS))
    target = depth * draw(st.integers(1, 3)) if operator in ("stack", "interleave") else draw(st.integers(depth, 12))
    sizes = draw(st.lists(st.integers(1, 41), min_size=1, max_size=2))
    layers, policy, world_size = (
        layer_map(operator, depth, target),
        draw(st.sampled_from(sorted(FACTORS))),
        draw(st.integers(1, 4)),
    )
    state, infos = random_state(depth, sizes, draw(st.integers(0, 99)))
    plan = plan_for(infos, layers, policy)
    held = cut(draw, {name: info.numel for name, info in infos.items()}, world_size, doubled=draw(st.booleans()))
    wanted = cut(draw, {name: info.numel for name, info in plan.parameters.items()}, world_size)
    return plan, state, {name: info.step for name, info in infos.items()}, held, wanted


def grow_simulated(plan: GrowthPlan, state: State, held: list, wanted: list) -> tuple[State, dict, list]:
    """Execute `plan` on as many simulated ranks as there are holdings."""

    def case(rank: ThreadRank):
        shard = ShardState(wanted[rank.rank])
        report = execute(plan, ShardState(held[rank.rank], state), shard, rank)
        return shard, report, rank.elements_sent

    results = run_threads(len(held), case)
    grown = assemble([shard for shard, *_ in results], {name: info.numel for name, info in plan.parameters.items()})
    return grown, results[0][0].steps, results


@given(growths())
@settings(max_examples=120, deadline=None)
def test_every_sharding_gives_the_bits_of_the_oracle(growth) -> None:
    plan, state, steps, held, wanted = growth
    grown, grown_steps, results = grow_simulated(plan, state, held, wanted)
    expected, expected_steps = grow_by_hand(state, steps, plan.layers, plan.optimizer_state)
    assert differing(grown, expected) == []
    assert grown_steps == expected_steps
    assert {report.tensors_verified for _, report, _ in results} == {len(plan.entries)}


def simple_case(world_size: int = 2):
    """A growth 2 -> 4 in which every tensor changes its rank."""
    state, infos = random_state(2, [7, 12], seed=3)
    plan = plan_for(infos, (0, 1, 0, 1))

    def shift(names, by: int) -> list[list[TensorSlice]]:
        table: list[list[TensorSlice]] = [[] for _ in range(world_size)]
        for i, (name, info) in enumerate(names.items()):
            table[(i + by) % world_size].append(TensorSlice(name, 0, info.numel))
        return table

    return plan, state, shift(infos, 0), shift(plan.parameters, 1)


def test_what_crosses_ranks_crosses_once() -> None:
    plan, state, held, wanted = simple_case()
    holder = {piece.name: rank for rank, pieces in enumerate(held) for piece in pieces}
    crossing = sum(
        entry.info.numel
        for entry in plan.entries
        for rank, pieces in enumerate(wanted)
        if any(piece.name == entry.target for piece in pieces) and holder[entry.source] != rank
    )
    _, _, results = grow_simulated(plan, state, held, wanted)
    assert crossing > 0
    assert sum(report.bytes_received for _, report, _ in results) == 3 * 4 * crossing
    total = sum(entry.info.numel for entry in plan.entries)
    assert sum(report.bytes_received + report.bytes_copied for _, report, _ in results) == 3 * 4 * total


def test_rounds_are_no_larger_than_one_block() -> None:
    plan, state, held, wanted = simple_case()
    block = sum(entry.info.numel for entry in plan.entries if entry.block == 0)
    _, _, results = grow_simulated(plan, state, held, wanted)
    for _, report, _ in results:
        assert 0 < report.largest_round <= 2 * 3 * 4 * block  # sent and received, three kinds, four bytes


def test_one_rank_that_receives_from_all_receives_no_more_than_a_block_at_a_time() -> None:
    """As where a model is gathered: each of the others sends little."""
    plan, state, *_ = simple_case()
    copies = make_plan_of_copies(plan, state)
    numels = {entry.target: entry.info.numel for entry in copies.entries}
    held = [[TensorSlice(n, size * r // 5, size * (r + 1) // 5) for n, size in numels.items()] for r in range(5)]
    wanted = [[TensorSlice(name, 0, size) for name, size in numels.items()]] + [[]] * 4
    grown, _, results = grow_simulated(copies, state, held, wanted)
    block = sum(entry.info.numel for entry in copies.entries if entry.block == 0)
    assert differing(grown, state) == []
    assert 0 < results[0][1].largest_round <= 3 * 4 * (block + 4)  # one element more from each of the others


def make_plan_of_copies(plan: GrowthPlan, state: State) -> GrowthPlan:
    infos = {entry.source: entry.info for entry in plan.entries}
    return plan_for({name: infos[name] for name in state["master"]}, tuple(range(plan.from_layers)))


@given(growths())
@settings(max_examples=60, deadline=None)
def test_what_a_rank_holds_it_takes_from_itself(growth) -> None:
    plan, _, _, held, wanted = growth
    moves = run_threads(len(held), lambda rank: schedule(plan, held[rank.rank], wanted[rank.rank], rank))
    for rank, own in enumerate(held):
        elements = {(piece.name, element) for piece in own for element in range(piece.start, piece.stop)}
        for move in moves[rank]:
            if move.crosses and move.dst_rank == rank:
                assert not any((move.source.name, element) in elements for element in range(move.start, move.stop))


class Faulty(ShardState):
    """Writes one element wrong."""

    def write(self, piece, kind, values) -> None:
        super().write(piece, kind, values)
        if kind == self.kind and piece.name == "blocks.3.part0.weight":
            self.read(piece, kind)[-1] += 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crosses", [True, False])
def test_a_wrong_element_is_noticed_on_every_rank(kind, crosses) -> None:
    plan, state, held, wanted = simple_case()
    if not crosses:
        held = [[TensorSlice(name, 0, len(v)) for name, v in state["master"].items()]] * 2
    failed = []

    def case(rank: ThreadRank) -> None:
        shard = Faulty(wanted[rank.rank])
        shard.kind = kind
        with pytest.raises(RuntimeError, match="differ from their source"):
            execute(plan, ShardState(held[rank.rank], state), shard, rank)
        failed.append(rank.rank)

    run_threads(2, case)
    assert sorted(failed) == [0, 1]


FAULTS = {
    "layer map off by one": lambda plan: plan_for(sources(plan), (1, 0, 1, 0)),
    "moments dropped": lambda plan: plan_for(sources(plan), plan.layers, "new_reset"),
    "noise": lambda plan: plan_for(sources(plan), plan.layers, transform=executor.Transform(noise=1e-6)),
}


def sources(plan: GrowthPlan) -> dict[str, ParameterInfo]:
    return random_state(plan.from_layers, [7, 12], seed=3)[1]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_notices_a_plan_with_a_fault(fault) -> None:
    plan, state, held, wanted = simple_case()
    steps = {name: info.step for name, info in sources(plan).items()}
    expected, _ = grow_by_hand(state, steps, plan.layers, "stack")
    assert differing(grow_simulated(plan, state, held, wanted)[0], expected) == []
    assert differing(grow_simulated(FAULTS[fault](plan), state, held, wanted)[0], expected)


def full_state(state: State) -> FullState:
    full = FullState({name: len(values) for name, values in state["master"].items()})
    full.tensors = state
    return full


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written() -> None:
    plan, state, *_ = simple_case()
    numels = {name: info.numel for name, info in plan.parameters.items()}
    incomplete = {kind: {n: v for n, v in tensors.items() if n != "head"} for kind, tensors in state.items()}
    cases = [
        (full_state(incomplete), FullState(numels), "no tensor head"),
        (
            full_state(state),
            FullState({n: v for n, v in numels.items() if n != "head"}),
            "grown model has no tensor head",
        ),
        (full_state(state), FullState(numels | {"head": 6}), "6 elements, but the plan says 5"),
    ]
    for reader, writer, message in cases:
        with pytest.raises(UserError, match=message):
            execute(plan, reader, writer, OneRank())
        assert not any(values.any() for values in writer.tensors["master"].values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_state_that_is_not_finite_is_named(kind, value) -> None:
    state, _ = random_state(2, [5], seed=0)
    check_finite(full_state(state), OneRank())
    state["master"]["head"][:2] = 3e38  # a sum that overflows is no fault
    check_finite(full_state(state), OneRank())
    state[kind]["blocks.1.part0.weight"][2] = value
    with pytest.raises(UserError, match=f"blocks.1.part0.weight \\({kind}\\)"):
        check_finite(full_state(state), OneRank())


@given(st.integers(1, 5000), st.data())
@settings(max_examples=60, deadline=None)
def test_the_checksum_sees_changed_and_exchanged_elements(count, data) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    first, second = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    values[second] = -values[first] if data.draw(st.booleans()) else values[second]  # they differ in one bit
    exchanged, changed = values.clone(), values.clone()
    exchanged[first], exchanged[second] = values[second], values[first]
    changed[first] += 1
    assert torch.equal(digest(values), digest(torch.cat([values[:1], values])[1:]))  # wherever it lies in memory
    assert torch.equal(digest(values), digest(exchanged)) == torch.equal(values, exchanged)
    assert not torch.equal(digest(values), digest(changed))


def test_a_state_that_has_diverged_is_moved_as_it_is() -> None:
    """A NaN differs from itself; that is no fault of the move."""
    state, infos = random_state(2, [5], seed=1)
    state["master"]["embedding"][1] = torch.nan
    plan = plan_for(infos, (0, 1, 0, 1))
    target = FullState({name: info.numel for name, info in plan.parameters.items()})
    execute(plan, full_state(state), target, OneRank())
    assert target.read(TensorSlice("embedding", 0, 8), "master").isnan().tolist() == [False, True] + [False] * 6
