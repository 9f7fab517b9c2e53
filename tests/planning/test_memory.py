"""Bytes by formula against what autograd and the models themselves hold."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_stacking.config import ModelConfig
from ds_stacking.kernels import linear_cross_entropy as head
from ds_stacking.models.bert import Bert
from ds_stacking.models.variants import bert_class
from ds_stacking.planning.memory import KEPT_BYTES, SLICE, activation_bytes, parameter_count, state_bytes, sum_bytes


def kept(model: Bert, rows: int, length: int, masked: int) -> int:
    """Bytes of all storages that autograd keeps of a forward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = (torch.arange(rows)[:, None] * length + torch.arange(1, masked + 1)).flatten()
    ids = torch.randint(1, 128, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(ids, masked_positions=positions, labels=ids.flatten()[positions])
    assert output.loss_sum.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_activations_are_what_autograd_keeps(norm: str, fused: bool) -> None:
    config = ModelConfig(hidden_size=64, num_heads=1, vocab_size=128, norm=norm, max_positions=64)
    for layers in (2, 6):
        expected = kept(bert_class(fused)(config, layers).train(), 8, 64, 9)
        formula = activation_bytes(config, layers, tokens=512, masked=72, item=4, fused=fused)
        assert formula == pytest.approx(expected, rel=0.08), layers


def test_the_head_holds_as_many_scores_as_is_planned() -> None:
    module = sys.modules[head.__module__]
    assert (module.SLICE, module.KEPT_BYTES) == (SLICE, KEPT_BYTES)
    config = ModelConfig(hidden_size=64, num_heads=1, vocab_size=16384)
    size = {"tokens": 512, "item": 2, "fused": True}
    few, many = (
        activation_bytes(config, 2, masked=rows, **size) - activation_bytes(config, 2, masked=rows - 1, **size)
        for rows in (16384, 16386)
    )
    assert few - many == (16384 - 8192) * 2


def test_checkpointing_keeps_one_block() -> None:
    config = ModelConfig(hidden_size=64, num_heads=1, vocab_size=128, gradient_checkpointing=True)
    size = {"tokens": 512, "masked": 72.0, "item": 2, "fused": True}
    for norm, inputs in (("post", 1), ("pre", 2)):
        config = replace(config, norm=norm)
        one_more = activation_bytes(config, 9, **size) - activation_bytes(config, 8, **size)
        assert one_more == inputs * 512 * 64 * 2


def test_parameters_are_those_of_the_model() -> None:
    config = ModelConfig(hidden_size=64, num_heads=1, vocab_size=128, next_sentence=True)
    assert parameter_count(config, 3) == sum(p.numel() for p in Bert(config, 3).parameters())


def test_states_are_those_of_the_zero_paper() -> None:
    """Figure 1 of Rajbhandari et al. 2020: 7.5 B weights on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB."""
    sizes = [state_bytes(7_500_000_000, zero_stage=stage, world_size=64, item=2) / 1e9 for stage in range(4)]
    assert sizes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_gradients_are_whole_but_in_stage_3_and_their_sums_fp32() -> None:
    """Bytes per weight on one of 4 GPUs, beside the gradients that `state_bytes` counts already."""

    def found(accumulates: bool) -> list[float]:
        return [sum_bytes(1, zero_stage=s, world_size=4, item=2, accumulates=accumulates) for s in range(4)]

    assert found(True) == [4, 4, 4 + 2 - 2 / 4, (4 - 2) / 4] and found(False) == [0, 0, 2 - 2 / 4, 0]
