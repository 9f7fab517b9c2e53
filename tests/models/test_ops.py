"""The CPU's own ways of dropout, attention and bf16 products against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ds_stacking.models import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_keeps_share_and_mean(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(501, 403, dtype=dtype, requires_grad=True)  # 201,903 elements: no multiple of four
    y = ops.dropout(x, probability)
    zeros = (y == 0).float().mean().item()
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(zeros - probability) < 4 * deviation
    kept = y[y != 0].unique()
    assert len(kept) == 1
    assert kept.item() == pytest.approx(1 / (1 - probability), rel=1e-4 if dtype == torch.float32 else 4e-3)
    y.backward(torch.full_like(y, 3.0))
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(x.grad[y != 0].float(), 3 * kept.float(), rtol=1e-2)


def test_dropout_is_independent_between_neighbours_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    x = torch.ones(1 << 18)
    dropped = (ops.dropout(x, 0.25) == 0).float()
    for distance in (1, 2, 3, 4, 8):
        both = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert both == pytest.approx(0.0625, abs=0.003)
    torch.manual_seed(0)
    assert torch.equal((ops.dropout(x, 0.25) == 0).float(), dropped)
    assert not torch.equal((ops.dropout(x, 0.25) == 0).float(), dropped)


def projections() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 13, 8).unbind()
    mask = (torch.arange(13) < torch.tensor([[13], [5]]))[:, None, None, :]
    return query, key, value, mask


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_equals_sdpa_but_for_the_dropout(monkeypatch, masked: bool) -> None:
    query, key, value, mask = projections()
    mask = mask if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "dropout", lambda x, probability: x)
        assert torch.allclose(ops.attention(query, key, value, mask, 0.3), expected, atol=1e-6)
    draws = torch.stack([ops.attention(query, key, value, mask, 0.3) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert draws.std(0).min() > 0.01
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


def test_a_sequence_of_padding_only_stays_finite() -> None:
    query, key, value, mask = projections()
    mask = mask.clone()
    mask[1] = False
    for probability in (0.0, 0.3):
        query.requires_grad_()
        output = ops.attention(query, key, value, mask, probability)
        output.sum().backward()
        assert output.isfinite().all()
        assert query.grad.isfinite().all()


def test_bf16_without_hardware_is_fp32_rounded_once(monkeypatch) -> None:
    monkeypatch.setattr(ops, "CPU_MULTIPLIES_BF16", False)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((7, 33), (5, 33), (5,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    result = ops.linear(x, weight, bias)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.double(), exact, rtol=2**-8, atol=1e-6)
    query, key, value, mask = projections()
    halves = [tensor.bfloat16() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in halves), attn_mask=mask)
    result = ops.attention(*halves, mask, 0.0)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.double(), expected, rtol=2**-8, atol=1e-6)
