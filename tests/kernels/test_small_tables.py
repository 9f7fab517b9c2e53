"""Gradients of small tables against fp64, and that they are no sort."""

import pytest
import torch
import torch.nn.functional as F

from ds_stacking.kernels.small_tables import look_up, table_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, period, rows, width", [(60, 60, 17, 33), (60, 12, 512, 33), (7, 1, 2, 5), (0, 0, 3, 4)]
)
def test_against_fp64(assert_close, tokens, period, rows, width, dtype):
    index, dout = torch.randint(rows, (period,)), torch.randn(tokens, width).to(dtype)
    want = torch.zeros(rows, width, dtype=torch.float64)
    want.index_add_(0, index.repeat(tokens // max(1, period)), dout.double())
    assert_close([table_gradient(dout, index, rows)], [want], dtype)
    if period:
        with pytest.raises(AssertionError, match="error"):  # a wrong row is noticed
            assert_close([table_gradient(dout, (index + 1) % rows, rows)], [want], dtype)


def test_look_up(assert_close):
    table, index = torch.randn(9, 5, requires_grad=True), torch.randint(9, (3, 4))
    out, weights = look_up(table, index), torch.randn(3, 4, 5)
    exact = table.detach().double().requires_grad_()
    want = F.embedding(index, exact)
    grad = torch.autograd.grad(want, exact, weights.double())
    assert_close([out, *torch.autograd.grad(out, table, weights)], [want, *grad])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"table has shape \(3,\); it must be \[R, N\]"):
        look_up(torch.ones(3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="index is torch.int32; it must be torch.int64"):
        look_up(torch.ones(3, 2), torch.zeros(1, dtype=torch.int32))
