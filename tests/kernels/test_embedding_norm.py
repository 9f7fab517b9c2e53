"""embedding_norm: the kernels in the interpreter against fp64 autograd of the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from ds_stacking.kernels._dropout import keep_mask
from ds_stacking.kernels.embedding_norm import embedding_norm

SEED = torch.tensor([55])
NAMES = ("word", "position", "segment", "weight", "shift")


def inputs(tokens, width, dtype, vocabulary=50):
    shapes = ((vocabulary, width), (16, width), (2, width), (width,), (width,))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return tensors, [torch.randint(size, (tokens,)) for size in (vocabulary, 16, 2)]


def plain(word, position, segment, weight, shift, ids, places, kinds, p):
    z = F.embedding(ids, word) + F.embedding(places, position)
    if segment is not None:
        z = z + F.embedding(kinds, segment)
    y = F.layer_norm(z, z.shape[1:], weight, shift, eps=1e-12)
    keep = keep_mask(SEED, torch.arange(y.shape[0])[:, None], torch.arange(y.shape[1]), p)
    return torch.where(keep, y / (1 - p), 0.0)


def with_gradients(y, tensors):
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, tensors, torch.randn(y.shape).to(y.dtype))]


def expected(tensors, indices, p, dtype):
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = plain(*exact, *indices, p)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, exact, torch.randn(y.shape).to(dtype).double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens, width, p", [(127, 768, 0.1), (17, 1000, 0.0), (1, 63, 0.3)])
def test_forward_and_gradients(kernels, assert_close, tokens, width, p, dtype):
    tensors, indices = inputs(tokens, width, dtype)
    with kernels(ROWS=32):
        y = embedding_norm(*indices, **dict(zip(NAMES, tensors, strict=True)), dropout=p, seed=SEED)
        actual = with_gradients(y, tensors)
    assert_close(actual, expected(tensors, indices, p, dtype), dtype)


def test_without_segments_and_reference(kernels, assert_close):
    (word, position, _, weight, shift), (ids, places, _) = inputs(40, 128, torch.float32)
    tensors = [word, position, weight, shift]
    tables = {"word": word, "position": position, "weight": weight, "shift": shift, "dropout": 0.2, "seed": SEED}
    with kernels(ROWS=32):
        actual = with_gradients(embedding_norm(ids, places, None, **tables), tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want = with_gradients(plain(*exact[:2], None, *exact[2:], ids, places, None, 0.2), exact)
    assert_close(actual, want)
    assert_close(with_gradients(embedding_norm(ids, places, None, **tables), tensors), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_places_that_repeat_one_kind_for_all_and_two_readers(kernels, assert_close, dtype):
    tensors, (ids, places, _) = inputs(36, 100, dtype)
    tables, places = dict(zip(NAMES, tensors, strict=True)), places[:12]
    with kernels(ROWS=32):
        y, again = embedding_norm(ids, places, None, **tables, dropout=0.2, seed=SEED, twice=True)
        assert y.data_ptr() == again.data_ptr()
        actual = with_gradients(y + again, tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = plain(*exact, ids, places.repeat(3), torch.zeros_like(ids), 0.2)
    torch.manual_seed(1)
    want = [2 * y, *torch.autograd.grad(2 * y, exact, torch.randn(y.shape).to(dtype).double())]
    assert_close(actual, want, dtype)
    reference, second = embedding_norm(ids, places, None, **tables, dropout=0.2, seed=SEED, twice=True)
    assert_close(with_gradients(reference + second, tensors), want, dtype)


def test_a_swapped_table_is_noticed(kernels, assert_close):
    tensors, (ids, places, kinds) = inputs(20, 64, torch.float32)
    with kernels(ROWS=32):
        y = embedding_norm(places, ids % 16, kinds, **dict(zip(NAMES, tensors, strict=True)))
    with pytest.raises(AssertionError, match="error"):
        assert_close([y], [plain(*tensors, ids, places, kinds, 0.0)])


def test_bad_input_is_named():
    tensors, (ids, places, kinds) = inputs(4, 8, torch.float32)
    tables = dict(zip(NAMES, tensors, strict=True))
    with pytest.raises(ValueError, match="kinds are rows of segment, which is missing"):
        embedding_norm(ids, places, kinds, **{**tables, "segment": None})
    with pytest.raises(ValueError, match="places has 3 entries for 4 tokens"):
        embedding_norm(ids, places[:3], kinds, **tables)
    with pytest.raises(ValueError, match="places is torch.int32 of shape"):
        embedding_norm(ids, places.int(), kinds, **tables)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\); word needs \[8\]"):
        embedding_norm(ids, places, kinds, **{**tables, "weight": torch.ones(7)})
