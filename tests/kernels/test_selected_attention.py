"""selected_attention: the kernels in the interpreter against fp64 autograd of the textbook formula of all queries."""

import pytest
import torch

from ds_stacking.kernels import attention, selected_attention
from tests.kernels.test_attention import SEED, cumulative, textbook

LENGTHS = [37, 0, 1, 90, 5]


def selection(count):
    """Tokens in no order, none of the last sequence."""
    return torch.randperm(sum(LENGTHS) - LENGTHS[-1])[:count]


def with_gradients(out, *inputs):
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype).to(out))]


def expected(q, kv, indices, p):
    """Of the selected rows of attention of all tokens, in fp64."""
    q, kv = (x.detach().double().requires_grad_() for x in (q, kv))
    every = torch.zeros(len(kv), *q.shape[1:], dtype=q.dtype).index_copy(0, indices, q)
    full = textbook(torch.cat([every[:, None], kv], 1), cumulative(LENGTHS)[:-1], LENGTHS, False, p)
    return with_gradients(full[indices], q, kv)


CASES = [(40, 64, 0.1, torch.float32), (70, 48, 0.2, torch.float16), (1, 16, 0.0, torch.float32)]


@pytest.mark.parametrize("count, size, p, dtype", CASES)
@pytest.mark.parametrize("interpreted", [True, False])
def test_as_attention_of_all_queries(kernels, assert_close, count, size, p, dtype, interpreted):
    indices = selection(count)
    q, kv = torch.randn(count, 2, size).to(dtype), torch.randn(sum(LENGTHS), 2, 2, size).to(dtype)
    q, kv = q.requires_grad_(), kv.requires_grad_()

    def run():
        out = selected_attention(q, kv, cumulative(LENGTHS), max(LENGTHS), indices, dropout=p, seed=SEED)
        return with_gradients(out, q, kv)

    if interpreted:
        with kernels(BLOCK_M=16, BLOCK_N=32):
            actual = run()
    else:
        actual = run()
    assert_close(actual, expected(q, kv, indices, p), dtype)


def test_keys_beyond_the_end_are_hidden_from_strongly_negative_scores(kernels, assert_close):
    """Beside scores of -64 that of a missing key, 0, has the weight e^64: infinite in fp16 wherever it is let in."""
    indices = selection(60)
    q, kv = torch.randn(60, 2, 64) + 8**0.5, torch.randn(sum(LENGTHS), 2, 2, 64)
    kv[:, 0] -= 8**0.5
    q, kv = q.half().requires_grad_(), kv.half().requires_grad_()
    with kernels(BLOCK_M=16, BLOCK_N=32):
        actual = with_gradients(selected_attention(q, kv, cumulative(LENGTHS), max(LENGTHS), indices), q, kv)
    assert_close(actual, expected(q, kv, indices, 0.0), torch.float16)


def test_the_reference_is_attention_of_all_to_the_bit():
    indices, packed = selection(30), torch.randn(sum(LENGTHS), 3, 2, 16)
    q, kv = packed[indices, 0].contiguous(), packed[:, 1:].contiguous()
    every = attention(packed, cumulative(LENGTHS), 90, dropout=0.1, seed=SEED)
    assert selected_attention(q, kv, cumulative(LENGTHS), 90, indices, dropout=0.1, seed=SEED).equal(every[indices])


def test_a_mask_of_other_rows_is_noticed(kernels, assert_close):
    indices = selection(40)
    q, kv = torch.randn(40, 2, 16), torch.randn(sum(LENGTHS), 2, 2, 16)
    with kernels(BLOCK_M=32, BLOCK_N=64):
        out = selected_attention(q, kv, cumulative(LENGTHS), 90, indices, dropout=0.1, seed=SEED + 1)
    want = expected(q, kv, indices, 0.1)[0]
    with pytest.raises(AssertionError, match="error"):
        assert_close([out], [want])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(3, 1, 8)}, r"they must be \[R, H, D\] and \[T, 2, H, D\] of one dtype"),
        ({"q": torch.ones(3, 1, 32)[..., ::2]}, "q has strides"),
        ({"indices": torch.arange(2)}, r"indices is torch.int64 \(2,\) on cpu; it must be torch.int64 \[3\] on cpu"),
        ({"indices": torch.tensor([0, 6, 1])}, r"indices reaches from 0 to 6; it must lie in \[0, 6\)"),
        ({"indices": torch.tensor([0, -1, 1])}, r"indices reaches from -1 to 1; it must lie in \[0, 6\)"),
        ({"indices": torch.tensor([4, 2, 4])}, "indices holds 4 more than once; select each token once"),
        ({"cu_seqlens": cumulative([6]).clamp(min=1)}, r"indices reaches from 0 to 2; it must lie in \[1, 6\)"),
        ({"cu_seqlens": cumulative([5])}, "cu_seqlens ends at 5, but kv holds 6 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens has dtype torch.int64; it must be torch.int32"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "q": torch.ones(3, 1, 16), "kv": torch.ones(6, 2, 1, 16), "cu_seqlens": cumulative([6]), "max_seqlen": 6,
        "indices": torch.arange(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        selected_attention(**{**good, **change})
