"""add_layer_norm: the kernels in the interpreter against fp64 autograd of the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ds_stacking.kernels._dropout import keep_mask
from ds_stacking.kernels.add_layer_norm import add_layer_norm

SEED = torch.tensor([1234567890123])


def inputs(rows, width, dtype=torch.float32):
    tensors = [torch.randn(rows, width) + 0.5, torch.randn(rows, width), *(torch.randn(width) for _ in range(3))]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def plain(x, residual, weight, shift, bias, p):
    keep = keep_mask(SEED, torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None], p)
    z = residual + torch.where(keep, (x + bias) / (1 - p), 0.0)
    return F.layer_norm(z, z.shape[1:], weight, shift, eps=1e-12), z


def gradients(outputs, tensors):
    torch.manual_seed(1)
    weights = [torch.randn(out.shape).to(out.dtype).double() for out in outputs]
    return torch.autograd.grad(outputs, tensors, [w.to(out.dtype) for w, out in zip(weights, outputs, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "rows, width, p, prenorm", [(127, 768, 0.1, False), (17, 1000, 0.0, True), (1, 63, 0.3, True)]
)
def test_forward_and_gradients(kernels, assert_close, rows, width, p, prenorm, dtype):
    tensors = inputs(rows, width, dtype)
    x, residual, weight, shift, bias = tensors
    with kernels(ROWS=32):
        out = add_layer_norm(x, weight, shift, residual=residual, bias=bias, dropout=p, seed=SEED, return_sum=prenorm)
        out = out if prenorm else (out,)
        actual = [*out, *gradients(out, tensors)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = plain(*exact, p)[: len(out)]
    assert_close(actual, [*expected, *gradients(expected, exact)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_two_readers_are_added_in_the_kernel(kernels, assert_close, dtype):
    tensors = inputs(33, 100, dtype)
    x, residual, weight, shift, bias = tensors
    with kernels(ROWS=32):
        out = add_layer_norm(x, weight, shift, residual=residual, bias=bias, dropout=0.1, seed=SEED, twice=True)
        assert out[0].data_ptr() == out[1].data_ptr()
        with Additions() as additions:
            actual = [*out, *gradients(out, tensors)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = plain(*exact, 0.1)[0]
    assert_close(actual, [y, y, *gradients((y, y), exact)], dtype)
    assert additions.found == 0
    with pytest.raises(AssertionError, match="tensor 2"):  # one reader's gradient alone
        assert_close(actual, [y, y, *gradients(plain(*exact, 0.1)[:1], exact)], dtype)


class Additions(TorchDispatchMode):
    """Counts sums of two tensors."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        return func(*args, **(kwargs or {}))


def test_plain_norm(kernels, assert_close):
    x, _, weight, shift, _ = inputs(70, 1024)
    with kernels(ROWS=16):
        out = add_layer_norm(x, weight, shift)
        actual = [out, *gradients([out], [x, weight, shift])]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, shift)]
    expected = F.layer_norm(exact[0], (1024,), exact[1], exact[2], eps=1e-12)
    assert_close(actual, [expected, *gradients([expected], exact)])


def test_reference_agrees_with_kernel_on_dropout(kernels, assert_close):
    tensors = inputs(33, 128)
    x, residual, weight, shift, bias = tensors

    def run():
        out = add_layer_norm(x, weight, shift, residual=residual, bias=bias, dropout=0.5, seed=SEED, return_sum=True)
        return [*out, *gradients(out, tensors)]

    with kernels(ROWS=16):
        actual = run()
    assert_close(actual, run())


def test_no_rows(kernels):
    tensors = inputs(0, 64)
    x, residual, weight, shift, _ = tensors
    with kernels():
        out = add_layer_norm(x, weight, shift, residual=residual)
        dweight = torch.autograd.grad(out.sum(), weight)[0]
    assert out.shape == (0, 64) and not dweight.any()


def test_a_wrong_mean_is_noticed(kernels, assert_close):
    x, residual, weight, shift, _ = inputs(17, 64)
    with kernels():
        out = add_layer_norm(x, weight, shift, residual=residual)
    wrong = F.layer_norm(
        x.double() + residual.double() + torch.eye(17, 64) * 1e-3, (64,), weight.double(), shift.double()
    )
    with pytest.raises(AssertionError, match="error"):
        assert_close([out], [wrong])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\).*needs \[8\]"),
        ({"residual": torch.ones(3, 8)}, r"residual is torch.float32 \(3, 8\).*\(4, 8\)"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"x": torch.ones(8, 4).T}, "x has strides"),
        ({"return_sum": True, "twice": True}, "return_sum and twice exclude each other"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x": torch.ones(4, 8), "weight": torch.ones(8), "shift": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**good, **change})
