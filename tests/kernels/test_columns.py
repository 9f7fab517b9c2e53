"""The second step of column sums, with more programs and columns than one tile holds."""

import torch

from ds_stacking.kernels._columns import sum_partials


def test_sum_of_partials(kernels, assert_close):
    partials = torch.randn(300, 3, 37)
    with kernels():
        sums = sum_partials(partials, torch.float32)
    assert_close([sums], [partials.double().sum(0)])


def test_no_programs_sum_to_zero(kernels):
    with kernels():
        assert torch.equal(sum_partials(torch.empty(0, 2, 5), torch.float32), torch.zeros(2, 5))
