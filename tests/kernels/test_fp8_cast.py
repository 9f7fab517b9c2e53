"""cast_fp8: the kernel in the interpreter against its reference to the bit, and both against the formats in fp64."""

import math

import pytest
import torch

from ds_stacking.kernels.fp8_cast import cast_fp8, largest_magnitude

FORMATS = {torch.float8_e4m3fn: (448.0, 2.0**-4), torch.float8_e5m2: (57344.0, 2.0**-3)}
"""Largest number, and largest relative error of a rounding to it: half a unit in the last place."""


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, width", [(37, 80), (130, 65), (1, 16), (64, 64), (0, 32)])
def test_kernel_is_the_reference(kernels, rows, width, source, dtype):
    x = (torch.randn(rows, width) * torch.randn(rows, 1).exp2()).to(source)
    amax = largest_magnitude(x)
    want = cast_fp8(x, amax, dtype)
    with kernels():
        found = cast_fp8(x, amax, dtype)
        straight, none, _ = cast_fp8(x, amax, dtype, turned=False)
        nothing, turned, _ = cast_fp8(x, amax, dtype, straight=False)
    assert same_bits(found[0], want[0]) and same_bits(straight, want[0])
    assert same_bits(found[1], want[1]) and same_bits(turned, want[1])
    assert found[2] == want[2]
    assert none.shape == nothing.shape == (0, 0)
    assert want[1].shape == (width, -(-rows // 16) * 16)
    assert same_bits(want[1][:, :rows].contiguous(), want[0].t().contiguous())
    assert not want[1][:, rows:].view(torch.uint8).any()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [2.0**-125, 1e-20, 1.0, 448.0, 450.0, 57344.0, 3e37])
def test_rounded_once_within_range(kernels, size, dtype):
    largest, error = FORMATS[dtype]
    x = torch.linspace(-size, size, 640).view(40, 16)
    for around in (kernels, None):
        with around() if around else torch.no_grad():
            rows, _, inverse = cast_fp8(x, largest_magnitude(x), dtype)
        assert math.frexp(inverse)[0] == 0.5, "a power of two"
        exact = x.double() / inverse.double()
        assert exact.max() <= largest and (2 * exact.max() > largest or inverse == 2.0**-100), "the largest one"
        wrong = (rows.double() - exact).abs()
        smallest_normal = {torch.float8_e4m3fn: 2.0**-6, torch.float8_e5m2: 2.0**-14}[dtype]
        assert (wrong <= error * exact.abs().clamp(min=smallest_normal)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_stay_and_what_is_not_finite_is_told(kernels, dtype):
    zero, nan = torch.zeros(5, 16), torch.ones(5, 16)
    nan[2, 3] = torch.nan
    for around in (kernels, None):
        with around() if around else torch.no_grad():
            rows, columns, inverse = cast_fp8(zero, largest_magnitude(zero), dtype)
            assert inverse.isfinite() and not rows.float().any() and not columns.float().any()
            for x in (nan, nan.nan_to_num(nan=torch.inf), nan.nan_to_num(nan=-torch.inf), -nan):
                assert cast_fp8(x, largest_magnitude(x), dtype)[2].isnan()


def test_bad_input_is_named():
    x, amax = torch.ones(4, 16), torch.ones(())
    with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(16, 4\).*contiguous bf16 or fp32"):
        cast_fp8(x.t(), amax, torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"amax is torch.float32 \(1,\); it must be torch.float32 without"):
        cast_fp8(x, amax[None], torch.float8_e5m2)
    with pytest.raises(ValueError, match="dtype is torch.float16; it must be torch.float8_e4m3fn or"):
        cast_fp8(x, amax, torch.float16)
