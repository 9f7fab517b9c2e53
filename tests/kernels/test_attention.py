"""attention: the kernels in the interpreter against fp64 autograd of the textbook formula, sequence by sequence."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_stacking.kernels._dropout import keep_mask
from ds_stacking.kernels._launch import recording
from ds_stacking.kernels.attention import attention, attention_padded, whole_heads

SEED = torch.tensor([987654321])


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def textbook(qkv, starts, lengths, causal, p):
    """[T, H, D] in qkv's dtype; every sequence on its own."""
    heads, size = qkv.shape[2:]
    out = torch.zeros_like(qkv[:, 0])
    for start, length in zip(starts, lengths, strict=True):
        q, k, v = qkv[start : start + length].permute(1, 2, 0, 3)  # [H, L, D]
        scores = q @ k.mT * size**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        rows = (start + torch.arange(length)) * heads + torch.arange(heads)[:, None]
        keep = keep_mask(SEED, rows[..., None], torch.arange(length), p)
        probabilities = torch.where(keep, scores.softmax(-1) / (1 - p), 0.0)
        out = out.index_add(0, start + torch.arange(length), (probabilities @ v).transpose(0, 1))
    return out


def with_gradient(out, *inputs):
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype))]


def bias_of(qkv):
    """One that is in qkv already: its values are never read."""
    return torch.full_like(qkv[(0,) * (qkv.dim() - 3)].flatten(), torch.nan).requires_grad_()


def expected(qkv, starts, lengths, causal, p, dout_dtype, biased=False):
    exact = qkv.detach().double().requires_grad_()
    out = textbook(exact, starts, lengths, causal, p)
    torch.manual_seed(1)
    dout = torch.randn(out.shape).to(dout_dtype).double()
    dqkv = torch.autograd.grad(out, exact, dout)[0]
    return [out, dqkv, dqkv.sum(0).flatten()] if biased else [out, dqkv]


# lengths, heads, head size, causal, dropout, dtype: fp16 up to 128 tokens takes the kernel for short sequences
CASES = [
    ([17, 0, 1, 63], 2, 64, False, 0.1, torch.float32),
    ([17, 0, 1, 63], 2, 64, False, 0.1, torch.float16),
    ([127, 128, 1], 1, 64, True, 0.2, torch.float16),
    ([127, 30], 1, 48, True, 0.0, torch.float32),
    ([200, 0, 130], 1, 64, True, 0.2, torch.float16),
    ([257], 1, 128, False, 0.0, torch.float32),
]


@pytest.mark.parametrize("lengths, heads, size, causal, p, dtype", CASES)
def test_unpadded(kernels, assert_close, lengths, heads, size, causal, p, dtype):
    starts = cumulative(lengths)
    qkv = torch.randn(sum(lengths), 3, heads, size).to(dtype).requires_grad_()
    bias = bias_of(qkv)
    with kernels(BLOCK_M=64, BLOCK_N=64, STAGES=1):
        out = attention(qkv, starts, max(lengths), causal=causal, dropout=p, seed=SEED, bias=bias)
        actual = with_gradient(out, qkv, bias)
        plain = with_gradient(attention(qkv, starts, max(lengths), causal=causal, dropout=p, seed=SEED), qkv)
    assert_close(actual, expected(qkv, starts[:-1], lengths, causal, p, dtype, biased=True), dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, plain, strict=False))  # the bias changes nothing else


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("causal, p, size", [(False, 0.1, 64), (True, 0.0, 48), (True, 0.2, 32)])
def test_both_forms_of_the_backward_pass(kernels, assert_close, monkeypatch, whole, causal, p, size):
    """Whole heads with five products, and tiles with seven; one program takes all heads, so its scratch is reused."""
    lengths = [150, 0, 193, 1]
    starts = cumulative(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, size).half().requires_grad_()
    bias = bias_of(qkv)
    asked = []
    module = importlib.import_module("ds_stacking.kernels.attention")  # the package gives the operator of this name
    monkeypatch.setattr(module, "whole_heads", lambda *_: asked.append(whole) or whole)
    with kernels(BLOCK_M=64, BLOCK_N=64):
        out = attention(qkv, starts, max(lengths), causal=causal, dropout=p, seed=SEED, bias=bias)
        actual = with_gradient(out, qkv, bias)
    assert asked == [whole]
    assert_close(actual, expected(qkv, starts[:-1], lengths, causal, p, torch.float16, biased=True), torch.float16)


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_no_two_tiles_write_the_same_sums(kernels, assert_close, tile):
    """Sequences that begin and end inside groups of 32 tokens, in tiles of one, two and four groups."""
    lengths = [33, 1, 0, 31, 95, 5, 64]
    qkv = torch.randn(sum(lengths), 3, 1, 16).requires_grad_()
    starts, bias = cumulative(lengths), bias_of(qkv)
    with kernels(BLOCK_M=tile, BLOCK_N=tile):
        actual = with_gradient(attention(qkv, starts, max(lengths), bias=bias), qkv, bias)
    assert_close(actual, expected(qkv, starts[:-1], lengths, False, 0.0, torch.float32, biased=True))


@pytest.mark.parametrize("length, whole", [(100, False), (150, True), (150, False)])
def test_keys_beyond_the_end_are_hidden_from_strongly_negative_scores(
    kernels, assert_close, monkeypatch, length, whole
):
    """Beside scores of -64 that of a missing key, 0, has the weight e^64: infinite in fp16 wherever it is let in."""
    qkv = torch.randn(length, 3, 2, 64)
    qkv[:, 0] += 8**0.5
    qkv[:, 1] -= 8**0.5
    qkv = qkv.half().requires_grad_()
    module = importlib.import_module("ds_stacking.kernels.attention")
    monkeypatch.setattr(module, "whole_heads", lambda *_: whole)
    with kernels(BLOCK_M=64, BLOCK_N=64, STAGES=1):
        actual = with_gradient(attention(qkv, cumulative([length]), length), qkv)
    assert_close(actual, expected(qkv, [0], [length], False, 0.0, torch.float16), torch.float16)


def test_whole_heads_where_they_fill_the_device():
    def chosen(longest, pairs, target="sm_90", size=64, itemsize=2):
        return whole_heads(target, longest, pairs, size, itemsize, 132)

    assert chosen(512, 768) and chosen(512, 256) and chosen(1024, 384)
    assert not chosen(512, 48) and not chosen(512, 140)  # most of the device would have nothing to do
    assert not chosen(2048, 768)  # no room in the L2 cache
    assert not chosen(512, 768, target="sm_80") and not chosen(512, 768, size=128) and not chosen(512, 768, itemsize=4)


@pytest.mark.parametrize("dtype, longest", [(torch.float32, 70), (torch.float16, 70), (torch.float16, 150)])
def test_padded(kernels, assert_close, dtype, longest):
    lengths = [longest, 0, 1, 33]
    qkv = torch.randn(4, longest, 3, 1, 32).to(dtype).requires_grad_()
    bias = bias_of(qkv)
    with kernels(BLOCK_M=64, BLOCK_N=64, STAGES=1):
        out = attention_padded(qkv, torch.tensor(lengths, dtype=torch.int32), dropout=0.1, seed=SEED, bias=bias)
        actual = with_gradient(out.flatten(0, 1), qkv, bias)
    starts = [longest * index for index in range(4)]
    want = expected(qkv.flatten(0, 1), starts, lengths, False, 0.1, dtype, biased=True)
    assert_close([actual[0], actual[1].flatten(0, 1), actual[2]], want, dtype)


def test_reference_agrees_with_formula(assert_close):
    lengths = [17, 0, 1, 63]
    starts = cumulative(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 16, requires_grad=True)
    bias = bias_of(qkv)
    actual = with_gradient(attention(qkv, starts, 70, causal=True, dropout=0.3, seed=SEED, bias=bias), qkv, bias)
    assert_close(actual, expected(qkv, starts[:-1], lengths, True, 0.3, torch.float32, biased=True))


def test_lengths_are_compiled_by_powers_of_two():
    """A symbolic length would end in guards on every value."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    qkv, starts = torch.randn(60, 3, 1, 16), cumulative([60])
    for length in (64, 60, 61, 62, 63, 64):
        torch.testing.assert_close(compiled(qkv, starts, length), attention(qkv, starts, length))
    assert len(graphs) <= 2, "one for the first length, one for any other up to 64"


def test_no_gradient_of_the_statistics_is_made():
    """lse is kept for the backward pass and has no gradient: nothing of its size is allocated for one."""

    class Zeros(TorchDispatchMode):
        found: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "zeros" in str(func) or "full" in str(func):
                self.found.append(func)
            return func(*args, **(kwargs or {}))

    qkv = torch.empty(32, 3, 1, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with recording() as launches, Zeros() as zeros:
        attention(qkv, torch.empty(3, dtype=torch.int32, device="meta"), 16).backward(
            torch.empty(32, 1, 16, device="meta", dtype=torch.bfloat16)
        )
    assert [launch.kernel.fn.__name__ for launch in launches] == ["forward", "backward_short"]
    assert not zeros.found


def test_extreme_scores_stay_finite(kernels, assert_close):
    qkv = (torch.randn(130, 3, 1, 16) * 30).requires_grad_()
    with kernels(BLOCK_M=64, BLOCK_N=64):
        actual = with_gradient(attention(qkv, cumulative([130]), 130), qkv)
    assert_close(actual, expected(qkv, [0], [130], False, 0.0, torch.float32), factor=100)


def test_a_wrong_scale_is_noticed(kernels, assert_close):
    qkv = torch.randn(20, 3, 1, 16, requires_grad=True)
    with kernels():
        actual = with_gradient(attention(qkv, cumulative([20]), 20, softmax_scale=0.2501), qkv)
    with pytest.raises(AssertionError, match="error"):
        assert_close(actual, expected(qkv, [0], [20], False, 0.0, torch.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.ones(6, 2, 1, 16)}, r"qkv has shape \(6, 2, 1, 16\); it must be \[T, 3, H, D\]"),
        ({"qkv": torch.ones(3, 6, 1, 16).transpose(0, 1)}, "qkv has strides"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens has dtype torch.int64; it must be torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens ends at 5, but qkv holds 6 tokens"),
        ({"bias": torch.ones(16)}, r"bias is torch.float32 \(16,\); it must be torch.float32 \[48\]"),
        ({"dropout": -0.1}, r"dropout is -0.1; it must lie in \[0, 1\)"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"qkv": torch.ones(6, 3, 1, 16), "cu_seqlens": cumulative([6]), "max_seqlen": 6}
    with pytest.raises(ValueError, match=message):
        attention(**{**good, **change})
