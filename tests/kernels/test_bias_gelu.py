"""bias_gelu and linear_gelu: the kernels in the interpreter against fp64 autograd of F.gelu."""

import pytest
import torch
import torch.nn.functional as F

from ds_stacking.kernels.bias_gelu import bias_gelu, linear_gelu


def with_gradients(y, tensors):
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, tensors, torch.randn(y.shape).to(y.dtype))]


def expected(tensors, form, dtype):
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    u = exact[0] + exact[1] if len(exact) == 2 else F.linear(*exact)
    y = F.gelu(u, approximate=form)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, exact, torch.randn(y.shape).to(dtype).double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("rows, width", [(127, 1000), (1, 17), (63, 3072)])
def test_bias_gelu(kernels, assert_close, rows, width, form, dtype):
    tensors = [(4 * torch.randn(size)).to(dtype).requires_grad_() for size in ((rows, width), (width,))]
    with kernels(ROWS=32, BLOCK_N=1024):
        actual = with_gradients(bias_gelu(*tensors, approximate=form), tensors)
    assert_close(actual, expected(tensors, form, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_linear_gelu(kernels, assert_close, form, dtype):
    shapes = ((70, 100), (130, 100), (130,))
    tensors = [(0.5 * torch.randn(size)).to(dtype).requires_grad_() for size in shapes]
    with kernels(ROWS=32, BLOCK_M=64, BLOCK_K=64):
        actual = with_gradients(linear_gelu(*tensors, approximate=form), tensors)
    assert_close(actual, expected(tensors, form, dtype), dtype)


def test_tails_are_exact(kernels):
    x = torch.tensor([[-60.0, -9.0, 0.0, 9.0, 60.0]], requires_grad=True)
    for form in ("none", "tanh"):
        with kernels(ROWS=1, BLOCK_N=8):
            y = bias_gelu(x, torch.zeros(5), approximate=form)
            (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 0.0, 9.0, 60.0]]), atol=1e-6, rtol=0)
        torch.testing.assert_close(dx, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]), atol=1e-6, rtol=0)


def ulps(got, want):
    """Largest distance of `got` from the exact `want` in units of the last digit of got's type; and below the smallest
    normal number, where a GPU's exponential and the interpreter give 0, in units of that."""
    info = torch.finfo(got.dtype)
    ulp = torch.exp2(torch.frexp(want).exponent - 1.0) * info.eps
    return ((got.double() - want).abs() / torch.where(want.abs() < info.tiny, info.tiny, ulp)).max()


@pytest.mark.parametrize("dtype, y_limit, slope_limit", [
    (torch.bfloat16, 1.25, 1.25),  # 1 of it is the interpreter's, which cuts digits off instead of rounding
    (torch.float16, 1.7, 8.5),  # at worst, beside the slope's zero
])  # fmt: skip
def test_every_16_bit_input_is_within_an_ulp(kernels, dtype, y_limit, slope_limit):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = every[every.isfinite() & (every.abs() < 1e30)].clone()[None].requires_grad_()
    with kernels(ROWS=1, BLOCK_N=65536, BLOCK_P=4):
        y = bias_gelu(x, torch.zeros(x.shape[1], dtype=dtype))
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    u = x.detach().double()
    density = torch.exp(-u.square() / 2) / (2 * torch.pi) ** 0.5
    tail = torch.special.log_ndtr(-u.abs()).exp()  # without the difference that 1 + erf is
    want = torch.where(u < 0, tail, 1 - tail)
    assert ulps(y.detach(), u * want) <= y_limit < ulps(y.detach() * 1.01, u * want)
    low = tail - u.abs() * density
    assert ulps(slope, torch.where(u < 0, low, 1 - low)) <= slope_limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_what_is_no_number_stays_none(kernels, form, dtype):
    x = torch.tensor([[torch.nan, torch.inf, 3.0]], dtype=dtype, requires_grad=True)
    with kernels(ROWS=1, BLOCK_N=4):
        y = bias_gelu(x, torch.zeros(3, dtype=dtype), approximate=form)
        (dx,) = torch.autograd.grad(y, x, torch.tensor([[1, 1, torch.nan]], dtype=dtype))
    assert y[0, 0].isnan() and y[0, 1].isinf() and y[0, 2].isfinite()
    assert dx[0, 0].isnan() and dx[0, 2].isnan()


def test_no_rows(kernels):
    x, bias = torch.ones(0, 8), torch.ones(8, requires_grad=True)
    with kernels():
        y = bias_gelu(x, bias)
        (dbias,) = torch.autograd.grad(y.sum(), bias)
    assert y.shape == (0, 8) and not dbias.any()


def test_the_other_form_is_noticed(kernels, assert_close):
    tensors = [torch.randn(size, requires_grad=True) for size in ((20, 40), (40,))]
    with kernels():
        actual = with_gradients(bias_gelu(*tensors, approximate="tanh"), tensors)
    with pytest.raises(AssertionError, match="error"):
        assert_close(actual, expected(tensors, "none", torch.float32))


def test_bad_input_is_named():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(5,\); it must be torch.float32 \[4\]"):
        bias_gelu(x, torch.ones(5))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 5\); x of shape \(3, 4\)"):
        linear_gelu(x, torch.ones(4, 5), torch.ones(4))
    with pytest.raises(ValueError, match="approximate is 'erf'; it must be 'none' or 'tanh'"):
        bias_gelu(x, torch.ones(4), approximate="erf")
