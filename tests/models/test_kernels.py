"""The model with its kernels themselves: in Triton's interpreter on a CPU, and traced as on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ds_stacking.config import ModelConfig
from ds_stacking.kernels.interpreter import interpreted
from ds_stacking.models.bert import Bert
from ds_stacking.models.fused import FusedBert

CONFIG = ModelConfig(
    hidden_size=32, num_heads=1, intermediate_size=48, vocab_size=61, max_positions=16, initializer_range=0.2
)
BLOCKS = {"ROWS": 64, "BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_P": 8, "BLOCK_T": 8, "STAGES": 1}
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def inputs() -> dict[str, Tensor]:
    """Two sequences of 12 tokens with five documents."""
    positions = torch.tensor([1, 4, 9, 13, 22])
    return {
        "input_ids": torch.arange(1, 25).view(2, 12),
        "masked_positions": positions,
        "labels": positions + 3,
        "cu_seqlens": torch.tensor([0, 5, 6, 12, 20, 24], dtype=torch.int32),
    }


def loss_and_gradients(model: Bert) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**inputs()).loss_sum
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@NORMS
def test_the_fused_model_begins_as_the_plain_one(norm: str) -> None:
    """The same parameters in the same order, with the same values of a seed."""
    states = []
    for kind in (Bert, FusedBert):
        torch.manual_seed(0)
        states.append(kind(replace(CONFIG, norm=norm, next_sentence=True), 2).state_dict())
    plain, fused = states
    assert list(plain) == list(fused)
    assert all(torch.equal(plain[name], fused[name]) for name in plain)


@NORMS
def test_kernels_compute_what_torch_does(norm: str) -> None:
    torch.manual_seed(0)
    plain, fused = (kind(replace(CONFIG, norm=norm), 2) for kind in (Bert, FusedBert))
    fused.load_state_dict(plain.state_dict())
    want, expected = loss_and_gradients(plain)
    with interpreted(**BLOCKS):
        got, gradients = loss_and_gradients(fused)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max(), name


@NORMS
@pytest.mark.parametrize("documents", [False, True])
def test_a_forward_pass_on_a_gpu_never_waits_for_it(norm: str, documents: bool) -> None:
    """Fake tensors refuse every operation whose shape or branch depends on values, as reading a count does."""
    config = replace(CONFIG, norm=norm, dropout=0.1, attention_dropout=0.1)
    with FakeTensorMode(), torch.no_grad():  # without a GPU autograd has no stream for it
        torch.set_default_dtype(torch.bfloat16)  # a fake model cannot be cast
        with torch.device("cuda"):
            model = FusedBert(config, 2, initialize=False)
        torch.set_default_dtype(torch.float32)
        batch = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in inputs().items()}
        if not documents:
            del batch["cu_seqlens"]
        loss = model(**batch).loss_sum
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        with pytest.raises(DataDependentOutputException):  # what reading a value would raise
            torch.ops.aten._local_scalar_dense(loss)
