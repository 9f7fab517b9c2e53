"""The interpreter leaves Triton as it found it."""

import torch

from ds_stacking.kernels import bias_gelu
from ds_stacking.kernels.cases import CASES
from ds_stacking.kernels.offline import compile_one, tasks


def test_kernels_compile_after_they_were_interpreted(kernels, monkeypatch, tmp_path):
    with kernels():
        bias_gelu(torch.randn(3, 8), torch.randn(8))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing compiled before
    for task in tasks({"gather": CASES["gather_rows/768"]})[:1]:
        assert compile_one(task).registers > 0
    assert any(tmp_path.iterdir())
