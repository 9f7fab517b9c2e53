"""linear_cross_entropy: the kernels in the interpreter against fp64 autograd of F.cross_entropy."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F

from ds_stacking.kernels.linear_cross_entropy import keeps_logits, linear_cross_entropy

module = importlib.import_module("ds_stacking.kernels.linear_cross_entropy")
FORMS = pytest.mark.parametrize("keep", [False, True])
"""Without and with kept logits."""


def inputs(rows, inner, vocabulary, dtype, bias=True):
    h, weight = torch.randn(rows, inner), torch.randn(vocabulary, inner) * inner**-0.5
    tensors = [h, weight, *([torch.randn(vocabulary)] if bias else [])]
    target = torch.randint(vocabulary, (rows,))
    target[::5] = -100
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], target


def with_gradients(loss, tensors):
    return [loss, *torch.autograd.grad(loss * 0.5, tensors)]


def expected(tensors, target, smoothing, z_loss):
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    x = F.linear(*exact)
    loss = F.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing)
    return with_gradients(loss + z_loss * (x.logsumexp(1).square() * (target != -100)).sum(), exact)


@pytest.mark.parametrize(
    "rows, inner, vocabulary, dtype, smoothing, z_loss, bias",
    [
        (127, 1000, 1000, torch.float16, 0.1, 1e-3, True),
        (63, 96, 517, torch.float32, 0.1, 1e-3, True),
        (1, 33, 130, torch.float32, 0.0, 0.0, False),
    ],
)
@FORMS
def test_forward_and_gradients(
    kernels, assert_close, monkeypatch, rows, inner, vocabulary, dtype, smoothing, z_loss, bias, keep
):
    monkeypatch.setattr(module, "SLICE", 384)  # several slices of the vocabulary
    tensors, target = inputs(rows, inner, vocabulary, dtype, bias)
    with kernels(BLOCK_M=64, BLOCK_K=128, BLOCK_V=256):
        h, weight, *rest = tensors
        loss = linear_cross_entropy(
            h, weight, rest[0] if bias else None, target, label_smoothing=smoothing, z_loss=z_loss, keep_logits=keep
        )
        actual = with_gradients(loss, tensors)
    assert_close(actual, expected(tensors, target, smoothing, z_loss), dtype)


@FORMS
def test_the_vocabulary_of_bert(kernels, assert_close, monkeypatch, keep):
    monkeypatch.setattr(module, "tile_width", lambda itemsize: 2048)
    tensors, target = inputs(17, 64, 30522, torch.float16)
    with kernels(BLOCK_M=32, BLOCK_K=64):
        actual = with_gradients(linear_cross_entropy(*tensors, target, keep_logits=keep), tensors)
    assert_close(actual, expected(tensors, target, 0.0, 0.0), torch.float16)


def test_bf16_logits(kernels, assert_close):
    tensors, target = inputs(60, 64, 517, torch.bfloat16)
    with kernels(BLOCK_V=128):
        actual = with_gradients(linear_cross_entropy(*tensors, target), tensors)
    assert_close(actual, expected(tensors, target, 0.0, 0.0), torch.bfloat16)


@pytest.mark.parametrize("dtype, times, shift", [
    (torch.float32, 60, 0), (torch.float32, 1, -200), (torch.float16, 1, 200), (torch.float16, 1, -200),
])  # fmt: skip
@FORMS
def test_exponentials_are_those_of_differences(kernels, assert_close, dtype, times, shift, keep):
    """Logits of 100 to 300, whose exponentials are infinite in fp32, and of -200, where they are 0."""
    (h, weight, bias), target = inputs(20, 48, 300, dtype)
    tensors = [x.detach().requires_grad_() for x in (h * times, weight, bias + shift)]
    assert F.linear(*tensors).abs().max() > 150
    with kernels(BLOCK_M=32, BLOCK_V=128):
        actual = with_gradients(linear_cross_entropy(*tensors, target, keep_logits=keep), tensors)
    assert_close(actual, expected(tensors, target, 0.0, 0.0), dtype, factor=10 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first, last", [(0, 1), (100, 400)])  # and whole tiles
@pytest.mark.parametrize("interpreted", [True, False])
@FORMS
def test_columns_without_probability(kernels, assert_close, dtype, first, last, interpreted, keep):
    """A bias of -inf, such as a vocabulary's padding may have."""
    tensors, target = inputs(20, 48, 517, dtype)
    with torch.no_grad():
        tensors[2][first:last] = -torch.inf
    target[(target >= first) & (target < last)] = 450
    with kernels(BLOCK_M=32, BLOCK_V=128) if interpreted else contextlib.nullcontext():
        actual = with_gradients(linear_cross_entropy(*tensors, target, z_loss=1e-3, keep_logits=keep), tensors)
    assert actual[0].isfinite()
    assert_close(actual, expected(tensors, target, 0.0, 1e-3), dtype)


@FORMS
def test_the_bias_gradient_of_many_rows(keep):
    """-35,000, half of a sum of 70,000 rows that fp16 cannot hold: it must be halved before it is rounded."""
    tensors, _ = inputs(70000, 2, 3, torch.float16)
    with torch.no_grad():
        tensors[2][0] = -30.0
    target = torch.zeros(70000, dtype=torch.int64)
    dbias = with_gradients(linear_cross_entropy(*tensors, target, keep_logits=keep), tensors)[3]
    want = expected(tensors, target, 0.0, 0.0)[3]
    assert want[0] < -34000
    torch.testing.assert_close(dbias.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("times, keep", [(3, True), (300, False)])
def test_how_large_bf16_logits_may_be(kernels, assert_close, times, keep):
    """20 where they are kept in 16 bits, any where they are computed again."""
    (h, *rest), target = inputs(100, 64, 2000, torch.bfloat16)
    tensors = [(h * times).detach().requires_grad_(), *rest]
    assert F.linear(*tensors).abs().max() > 4 * times
    with kernels(BLOCK_M=64, BLOCK_V=128):
        loss = linear_cross_entropy(*tensors, target, label_smoothing=0.1, z_loss=1e-3, keep_logits=keep)
        actual = with_gradients(loss, tensors)
    assert_close(actual, expected(tensors, target, 0.1, 1e-3), torch.bfloat16)


def test_logits_are_kept_where_they_are_few(monkeypatch):
    assert keeps_logits(4915, 30522, torch.bfloat16) and keeps_logits(8794, 30522, torch.bfloat16)
    assert not keeps_logits(8795, 30522, torch.bfloat16) and not keeps_logits(4915, 30522, torch.float16)
    tensors, target = inputs(50, 8, 40, torch.float32)
    sizes = {}
    for limit in (50 * 40 * 4, 50 * 40 * 4 - 1):
        monkeypatch.setattr(module, "KEPT_BYTES", limit)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            linear_cross_entropy(*tensors, target)
        sizes[limit] = max(x.numel() for x in saved)
    assert sizes == {8000: 50 * 64, 7999: 50 * 8}


@FORMS
def test_reference_agrees_with_formula(assert_close, keep):
    tensors, target = inputs(50, 32, 9000, torch.float32)
    loss = linear_cross_entropy(*tensors, target, label_smoothing=0.2, z_loss=1e-2, keep_logits=keep)
    assert_close(with_gradients(loss, tensors), expected(tensors, target, 0.2, 1e-2))


@FORMS
def test_all_rows_ignored_and_no_rows(kernels, keep):
    (h, weight, bias), target = inputs(5, 16, 40, torch.float32)
    with kernels():
        for rows in (5, 0):
            loss = linear_cross_entropy(h[:rows], weight, bias, torch.full_like(target[:rows], -100), keep_logits=keep)
            assert loss == 0
            assert not any(g.any() for g in torch.autograd.grad(loss, (weight, bias)))


@FORMS
def test_a_shifted_target_is_noticed(kernels, assert_close, keep):
    tensors, target = inputs(20, 16, 40, torch.float32)
    with kernels():
        actual = with_gradients(linear_cross_entropy(*tensors, target.clamp(min=0), keep_logits=keep), tensors)
    with pytest.raises(AssertionError, match="error"):
        assert_close(actual, expected(tensors, (target + 1).clamp(min=0, max=39), 0.0, 0.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(9, 5)}, r"weight has shape \(9, 5\); h of shape \(3, 4\)"),
        ({"bias": torch.ones(8)}, r"bias is torch.float32 \(8,\)"),
        ({"target": torch.tensor([0, 9, 1])}, r"target reaches from 0 to 9; it must lie in \[0, 9\)"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target is torch.int64 \(2,\)"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "h": torch.ones(3, 4),
        "weight": torch.ones(9, 4),
        "bias": torch.ones(9),
        "target": torch.tensor([0, 8, -100]),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})
