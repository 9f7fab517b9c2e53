"""The dropout mask: its rate, its independence of row, column and seed, and the kernels' agreement with PyTorch."""

import pytest
import torch

from ds_stacking.kernels._dropout import keep_mask
from ds_stacking.kernels.add_layer_norm import add_layer_norm


def mask(seed, p, rows=2048, columns=768):
    return keep_mask(torch.tensor([seed]), torch.arange(rows)[:, None], torch.arange(columns), p)


def z_score(observed, p, count):
    return (observed - p) / (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**61 + 12345])
def test_rate(seed, p):
    dropped = ~mask(seed, p)
    assert abs(z_score(dropped.double().mean(), p, dropped.numel())) < 4
    for axis in (0, 1):
        scores = z_score(dropped.double().mean(axis), p, dropped.shape[axis])
        assert 0.8 < scores.std() < 1.2 and scores.abs().max() < 6


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_correlation_at_any_distance(p):
    centred = mask(3, p).double() - (1 - p)
    for axis, size in ((1, 768), (0, 2048)):
        spectrum = torch.fft.rfft(centred, 2 * size, dim=axis)
        lags = torch.fft.irfft(spectrum.abs().square().sum(1 - axis))[1 : size - 16]
        pairs = centred.numel() / size * (size - torch.arange(1, size - 16))
        scores = lags / (p * (1 - p)) / pairs.sqrt()
        assert scores.std() < 1.2 and scores.abs().max() < 6


def test_seeds_give_different_masks():
    p, (first, second) = 0.5, (mask(seed, 0.5) for seed in (7, 8))
    assert abs(z_score((first == second).double().mean(), p, first.numel())) < 5


def test_p_zero_keeps_everything():
    assert mask(5, 0.0).all()


def test_kernel_mask_is_the_reference_mask_forward_and_backward(kernels):
    x, seed, p = torch.ones(40, 96, requires_grad=True), torch.tensor([2**40 + 17]), 0.3
    weight, shift = torch.ones(96), torch.zeros(96)
    with kernels(ROWS=16):
        _, total = add_layer_norm(x, weight, shift, dropout=p, seed=seed, return_sum=True)
        (gradient,) = torch.autograd.grad(total.sum(), x)
    keep = keep_mask(seed, torch.arange(40)[:, None], torch.arange(96), p)
    assert torch.equal(total != 0, keep)
    assert torch.equal(gradient != 0, keep)
