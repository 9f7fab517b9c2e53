"""Transforms of copies: the same bits in every sharding, noise with the moments it says, only copies touched."""

from __future__ import annotations

import zlib

import pytest
import torch

from ds_stacking.common.errors import UserError
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.plan import ParameterInfo, make_plan
from ds_stacking.growth.transforms import OUTPUT_PROJECTION, Transform, uniform_noise

CPU = torch.device("cpu")


def splitmix64(state: int) -> int:
    """The output function of SplitMix64 in Python's integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    return ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask


def test_noise_is_splitmix64_of_the_position() -> None:
    key = zlib.crc32(b"blocks.1.weight") << 31
    found = uniform_noise("blocks.1.weight", 1000, 4, CPU)
    for i, value in enumerate(found.tolist()):
        bits = splitmix64(((key + 1000 + i) * 0x9E3779B97F4A7C15) % 2**64) >> 40
        assert value == pytest.approx((bits / 2**24 - 0.5) * 12**0.5, abs=1e-6)


def test_noise_has_mean_0_and_variance_1_and_differs_by_name() -> None:
    noise = uniform_noise("a", 0, 100_000, CPU)
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02
    other = uniform_noise("b", 0, 100_000, CPU)
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 0.02


def test_pieces_give_the_bits_of_the_whole() -> None:
    values = torch.randn(101, generator=torch.Generator().manual_seed(0))
    transform = Transform(scale=0.7, noise=0.1)
    whole = transform.apply(values, "name", 0)
    pieces = [transform.apply(values[a:b], "name", a) for a, b in ((0, 13), (13, 14), (14, 101))]
    assert torch.equal(whole, torch.cat(pieces))
    assert ((whole - 0.7 * values).abs() <= 0.7 * 0.1 * 1.74 * values.abs() + 1e-6).all()


@pytest.mark.parametrize(
    "name",
    [
        "attention.out.weight", "feed_forward.down.bias", "attn.c_proj.weight", "mlp.c_proj.bias",
        "self_attn.o_proj.weight", "mlp.down_proj.weight",
        "attention.output.dense.weight", "output.dense.bias", "fc2.weight", "ffn.lin2.weight",
    ],
)  # fmt: skip
def test_output_projections_are_known_by_name(name) -> None:
    assert OUTPUT_PROJECTION.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["attention.qkv.weight", "mlp.c_fc.weight", "intermediate.dense.weight", "norm.bias", "layout"]
)
def test_other_tensors_are_not_taken_for_output_projections(name) -> None:
    assert not OUTPUT_PROJECTION.fullmatch(name)


def plan(names: list[str], transform: Transform):
    infos = {f"blocks.{i}.{name}": ParameterInfo(numel=4, decay=True) for i in range(2) for name in names}
    layers = (0, 1, 0, 1)
    return make_plan(
        infos,
        find_block_names({name: (info.numel,) for name, info in infos.items()}),
        layers,
        operator="stack",
        optimizer_state="stack",
        stage=1,
        transform=transform,
    )


def test_only_copies_change_and_only_output_projections_are_scaled() -> None:
    entries = plan(["qkv.weight", "out.weight"], Transform(scale=0.0, noise=0.1)).entries
    found = {entry.target: entry.transform for entry in entries}
    assert found["blocks.1.out.weight"] == found["blocks.1.qkv.weight"] == Transform()
    assert found["blocks.2.out.weight"] == Transform(scale=0.0, noise=0.1)
    assert found["blocks.3.qkv.weight"] == Transform(noise=0.1)


def test_blocks_without_an_output_projection_cannot_be_scaled() -> None:
    with pytest.raises(UserError, match="no output projection"):
        plan(["w"], Transform(scale=0.0))
