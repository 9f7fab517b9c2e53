"""gather_rows and scatter_rows: the kernel in the interpreter against indexing, exactly."""

import pytest
import torch

from ds_stacking.kernels.gather_rows import gather_rows, inverse_index, scatter_rows


def selection(rows, kept):
    indices = torch.randperm(rows)[:kept].sort().values
    return indices, inverse_index(indices, rows)


@pytest.mark.parametrize("rows, kept, width", [(127, 63, 768), (40, 40, 17), (9, 0, 8), (5, 1, 1000)])
def test_gather(kernels, rows, kept, width):
    x = torch.randn(rows, width, requires_grad=True)
    indices, inverse = selection(rows, kept)
    dout = torch.randn(kept, width)
    with kernels(ROWS=64, BLOCK_N=1024):
        out = gather_rows(x, indices, inverse)
        (dx,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(out, x[indices])
    assert torch.equal(dx, torch.zeros_like(x).index_copy(0, indices, dout))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("rows, kept, width", [(127, 63, 96), (9, 0, 8)])
def test_scatter(kernels, rows, kept, width, with_base):
    x, base = torch.randn(kept, width, requires_grad=True), torch.randn(rows, width, requires_grad=True)
    indices, inverse = selection(rows, kept)
    dout = torch.randn(rows, width)
    with kernels(ROWS=64, BLOCK_N=1024):
        out = scatter_rows(x, indices, inverse, base if with_base else None)
        dx, dbase = torch.autograd.grad(out, (x, base), dout, allow_unused=True)
    want = (base if with_base else torch.zeros(rows, width)).index_copy(0, indices, x)
    assert torch.equal(out, want)
    assert torch.equal(dx, dout[indices])
    if with_base:
        assert torch.equal(dbase, dout.index_fill(0, indices, 0.0))


def test_half_precision_is_copied_bit_by_bit(kernels):
    x = torch.randn(30, 64).half()
    indices, inverse = selection(30, 11)
    with kernels():
        assert torch.equal(gather_rows(x, indices, inverse), x[indices])


def test_reference_is_the_kernel(kernels):
    x, base = torch.randn(6, 32), torch.randn(20, 32)
    indices, inverse = selection(20, 6)
    with kernels():
        out = scatter_rows(x, indices, inverse, base)
    assert torch.equal(out, scatter_rows(x, indices, inverse, base))


def test_bad_input_is_named():
    x = torch.ones(5, 4)
    indices, inverse = selection(5, 2)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\).*contiguous \[5, N\]"):
        gather_rows(x[:3], indices, inverse)
    with pytest.raises(ValueError, match="indices is torch.int32"):
        gather_rows(x, indices.int(), inverse)
    with pytest.raises(ValueError, match=r"base is torch.float32 \(4, 4\); .*\[5, 4\]"):
        scatter_rows(x[:2], indices, inverse, torch.ones(4, 4))
