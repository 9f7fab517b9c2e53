"""What a growth does to the weights of a copy: nothing, a factor on what its sub-layers put out, or noise.

A transform is a pure function of values and positions, so that every sharding of a tensor gives the same bits.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import shown

OUTPUT_PROJECTION = re.compile(
    r"(.*\.)?(out|down|o_proj|out_proj|down_proj|c_proj|wo|fc2|lin2|out_lin|output\.dense|dense_4h_to_h)\.(weight|bias)"
)
"""The linear layers whose output a sub-layer adds to the residual stream, as the common models name them."""

GOLDEN = -7046029254386353131  # 2**64 / golden ratio as int64: the step of SplitMix64 (Steele et al., OOPSLA 2014)
MIX = (-4658895280553007687, -7723592293110705685)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """target = source * scale * (1 + noise * u), with u of mean 0 and variance 1."""

    scale: float = 1.0
    """Factor; 0 writes zeros."""
    noise: float = 0.0
    """Standard deviation of the noise relative to each weight."""

    def apply(self, values: Tensor, name: str, start: int) -> Tensor:
        """Transform `values` ([N] float32), the elements of tensor `name` that begin at `start`."""
        if self.noise:
            values = values * (1 + self.noise * uniform_noise(name, start, values.numel(), values.device))
        return values if self.scale == 1 else values * self.scale

    def of(self, rest: str) -> Transform:
        """The transform of one parameter of a copy, named within its block: only output projections are scaled."""
        return self if OUTPUT_PROJECTION.fullmatch(rest) else replace(self, scale=1.0)


COPY = Transform()
ZEROS = Transform(scale=0.0)


def parse_modifiers(modifiers: Sequence[str]) -> Transform:
    """Read the modifiers of an operator; raises UserError for an unknown one.

    zero_output  copies and fresh blocks start with output projections of zero: in a pre-LN model they are the
                 identity, and the model computes what it did (LLaMA Pro of Wu et al. 2024, section 3.2; LEMON of
                 Wang et al., ICLR 2024)
    scale:C      their output projections start C times as large (the per-tensor `scale` of model merging)
    noise:C      every weight of a copy is multiplied by 1 + C*u, which breaks the symmetry between a block and its
                 copy (Net2Net of Chen et al., ICLR 2016, section 3; expert noise in orthogonal growth, 2510.08008)
    """
    transform = COPY
    for modifier in modifiers:
        match = re.fullmatch(
            r"\s*(?:(zero_output)|(scale|noise):([0-9]{0,9}\.?[0-9]{1,9}(?:e-?[0-9]{1,3})?))\s*", modifier
        )
        if not match:
            raise UserError(
                f"modifier {shown(modifier.strip())} is unknown; choose zero_output, scale:C or noise:C (noise:0.01)."
            )
        transform = replace(transform, **({"scale": 0.0} if match[1] else {match[2]: float(match[3])}))
    return transform


def uniform_noise(name: str, start: int, count: int, device: torch.device) -> Tensor:
    """Noise for elements start..start+count of tensor `name`: [N] float32, uniform, mean 0, variance 1.

    SplitMix64 of the element's position under a key made from the name. Uniform, because integers and one product
    give the same bits on every device; logarithms do not.
    """
    key = zlib.crc32(name.encode())
    bits = (torch.arange(start, start + count, device=device) + (key << 31)) * GOLDEN
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        bits = (bits ^ _shift_right(bits, shift)) * factor
    bits = _shift_right(bits, 40)  # 24 bits, which float32 holds exactly
    return (bits.to(torch.float32) - (2**23 - 0.5)) * (math.sqrt(12) / 2**24)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift; torch's own fills with the sign bit."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
