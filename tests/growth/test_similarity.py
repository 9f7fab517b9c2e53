"""Norms and cosines over simulated ranks against full tensors compared in the plainest way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.similarity import copies, cosines, norms, seams
from ds_stacking.growth.state import KINDS, FullState, TensorSlice
from tests.growth.simulated import ShardState, run_threads
from tests.growth.test_executor import cut, random_state


@pytest.mark.parametrize(
    ("layers", "pairs", "places"),
    [
        ((0, 1, 2, 0, 1, 2), {3: 0, 4: 1, 5: 2}, [3]),
        ((0, 0, 1, 1), {1: 0, 3: 2}, [1, 3]),
        ((0, 1, 2, 1, 2, 3), {3: 1, 4: 2}, [3]),
        ((0, 1, None), {}, [2]),
        ((0, 1), {}, []),
        ((1, 0, 0), {2: 1}, [1, 2]),
    ],
)
def test_copies_and_seams(layers, pairs, places) -> None:
    assert copies(layers) == pairs
    assert seams(layers) == places


def compared(shard, infos, exchange):
    """Cosines of blocks 2 and 3 with block 0, and the norms of all blocks."""
    blocks = find_block_names({name: (info.numel,) for name, info in infos.items()})
    numels = {name: info.numel for name, info in infos.items()}
    labels = {name: str(parts[0]) for name in infos if (parts := blocks.split(name)) and infos[name].decay}
    norm = norms(shard.slices(), lambda piece: shard.read(piece, "master"), labels, numels, exchange)
    return cosines(shard, infos, blocks, {2: 0, 3: 0}, exchange), norm


def by_hand(state, infos, kind: str) -> list[torch.Tensor]:
    """Every block's decayed tensors, one after another."""
    decayed = [name for name, info in infos.items() if info.decay]
    return [
        torch.cat([state[kind][name].double() for name in decayed if name.startswith(f"blocks.{i}.")])
        for i in range(4)
    ]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), world_size=st.integers(1, 3), replicated=st.booleans())
def test_any_sharding_gives_the_numbers_of_full_tensors(data, world_size, replicated) -> None:
    state, infos = random_state(4, [data.draw(st.integers(1, 20)) * 2, 7], seed=3)
    numels = {name: info.numel for name, info in infos.items()}
    everything = [TensorSlice(name, 0, numel) for name, numel in numels.items()]
    pieces = [everything] * world_size if replicated else cut(data.draw, numels, world_size)

    def rank(exchange):
        return compared(ShardState(pieces[exchange.rank], state), infos, exchange)

    for found, norm in run_threads(world_size, rank):
        for kind in KINDS:
            full = by_hand(state, infos, kind)
            expected = {i: float(torch.nn.functional.cosine_similarity(full[i], full[0], dim=0)) for i in (2, 3)}
            assert found[kind] == pytest.approx(expected, abs=1e-12)
        assert norm == pytest.approx({str(i): float(x.norm()) for i, x in enumerate(by_hand(state, infos, "master"))})


def test_what_lies_on_one_rank_stays_there() -> None:
    state, infos = random_state(4, [8], seed=3)
    numels = {name: info.numel for name, info in infos.items()}
    halves = [
        [TensorSlice(n, 0, k // 2) for n, k in numels.items()],
        [TensorSlice(n, k // 2, k) for n, k in numels.items()],
    ]

    def rank(exchange):
        compared(ShardState(halves[exchange.rank], state), infos, exchange)
        return exchange.elements_sent

    assert run_threads(2, rank) == [0, 0]


def test_a_zero_moment_has_no_cosine() -> None:
    state, infos = random_state(4, [4], seed=0)
    state["exp_avg"]["blocks.2.part0.weight"].zero_()
    full = FullState({name: info.numel for name, info in infos.items()})
    full.tensors = state
    found, _ = compared(full, infos, OneRank())
    assert found["exp_avg"][2] is None
    assert found["exp_avg"][3] is not None
