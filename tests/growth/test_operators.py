"""Operators: layer maps written out by hand, properties over random depths, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stacking.common.errors import UserError
from ds_stacking.growth.operators import OPERATORS, layer_map, originals, parse_operator
from ds_stacking.growth.transforms import Transform

BY_HAND = [
    ("stack", 3, "0 1 2 0 1 2"),
    ("stack", 2, "0 1 0 1 0 1"),
    ("interleave", 3, "0 0 1 1 2 2"),
    ("interleave", 2, "0 0 0 1 1 1"),
    ("middle", 4, "0 1 2 1 2 3"),
    ("middle", 3, "0 1 2 0 1 2"),
    ("middle", 3, "0 1 0 1 2"),
    ("last", 4, "0 1 2 3 2 3"),
    ("last", 3, "0 1 2 1 2"),
    ("last", 2, "0 1 0 1 1"),
    ("fresh", 2, "0 1 * *"),
    ("stack[1:-1]", 4, "0 1 2 1 2 3"),
    ("interleave[1:]", 3, "0 1 1 2 2"),
    ("stack[:2]", 3, "0 1 0 1 2"),
    ("middle[2:]+zero_output", 5, "0 1 2 3 3 4"),
    ("0,1,2,2,1,0", 3, "0 1 2 2 1 0"),
    ("1, *, 0", 2, "1 * 0"),
]


@pytest.mark.parametrize(("operator", "source", "expected"), BY_HAND)
def test_layer_maps_are_those_written_by_hand(operator: str, source: int, expected: str) -> None:
    layers = tuple(None if item == "*" else int(item) for item in expected.split())
    assert layer_map(operator, source, len(layers)) == layers


def test_originals_are_the_first_that_name_a_source() -> None:
    assert originals((2, None, 0, 2, 0, 1)) == {0, 2, 5}


@given(
    st.sampled_from(sorted(OPERATORS)), st.integers(0, 2), st.integers(1, 12), st.integers(0, 2), st.integers(1, 30)
)
def test_any_depth_that_is_reached_keeps_every_block_in_order(name, first, inner, final, inner_target) -> None:
    source, target = first + inner + final, first + inner_target + final
    operator = f"{name}[{first}:{source - final}]"
    strict = name in ("stack", "interleave")
    if target < source or (strict and inner_target % inner):
        with pytest.raises(UserError):
            layer_map(operator, source, target)
        return
    layers = layer_map(operator, source, target)
    assert len(layers) == target
    assert layers[:first] == tuple(range(first))
    assert layers[target - final :] == tuple(range(source - final, source))
    positions = sorted(originals(layers))
    assert [layers[p] for p in positions] == list(range(source)), "every source block is there, in its order"
    if name in ("middle", "last"):
        counts = [layers.count(block) for block in range(first, source - final)]
        assert max(counts) <= 2 * min(counts) or min(counts) == 1


BAD = [
    ("stak", 2, 4, "did you mean stack"),
    ("stack", 3, 5, "not a multiple of 3"),
    ("interleave[1:]", 3, 4, "not a multiple of 2"),
    ("stack", 4, 2, "would shrink"),
    ("stack[2:]", 2, 4, "leaves all 2 blocks alone"),
    ("0,1,2", 2, 3, "names block 2"),
    ("0,1", 2, 4, "lists 2 blocks"),
    ("0,1,0[1:]", 2, 3, "limits an explicit list"),
    ("stack+zero", 2, 4, "modifier 'zero' is unknown"),
    ("stack+noise", 2, 4, "modifier 'noise' is unknown"),
    ("stack[1:2", 2, 4, "has wrong bounds"),
    ("", 2, 4, "is unknown"),
]


@pytest.mark.parametrize(("operator", "source", "target", "message"), BAD)
def test_what_cannot_be_is_refused_in_a_sentence(operator, source, target, message) -> None:
    with pytest.raises(UserError, match=message):
        layer_map(operator, source, target)


def test_modifiers_are_read() -> None:
    assert parse_operator("stack+noise:0.01+scale:.5").transform == Transform(scale=0.5, noise=0.01)
    assert parse_operator("stack[1:]+zero_output").transform == Transform(scale=0.0)


def test_modifiers_of_copies_need_copies() -> None:
    assert layer_map("fresh+zero_output", 2, 4) == (0, 1, None, None)
    assert layer_map("0,*,0+scale:0.5", 1, 3) == (0, None, 0)
    for operator in ("fresh+noise:0.01", "0,1,*+scale:0.5"):
        with pytest.raises(UserError, match="copies no block, so scale and noise do nothing"):
            layer_map(operator, 2, 4 if operator.startswith("fresh") else 3)


LONG = "9" * 5000


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("stack[9999999999:]", "has wrong bounds"),
        (f"stack[{LONG}:]", "has wrong bounds"),
        ("stack[-:]", "'-' is no bound"),
        ("stack[١:]", "has wrong bounds"),
        ("0,١", "is unknown"),
        (LONG, "is unknown"),
        (",".join("0" * 100_000), "lists 100,000 blocks"),
        ("x" * 100_000, "is unknown"),
        ("stack+noise:" + LONG, "is unknown"),
        ("stack+scale:1e400", "scale and noise must be at most"),
        ("stack+scale:nan", "is unknown"),
        ("stack+scale:-1", "is unknown"),
        ("stack+noise:" + "9" * 100_000 + "x", "is unknown"),
    ],
)
def test_notation_without_bounds_is_refused_in_one_short_sentence(operator, message):
    with pytest.raises(UserError, match=message) as error:
        layer_map(operator, 2, 4)
    assert len(str(error.value)) < 300


def test_a_depth_that_would_fill_the_memory_is_refused():
    with pytest.raises(UserError, match="at most 100,000 of them"):
        layer_map("stack", 1, 10**9)
