"""The FLOP formula against torch's own counter on the real model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.flops import training_flops, training_flops_per_token


def config(norm: str, next_sentence: bool) -> ModelConfig:
    return ModelConfig(
        hidden_size=24,
        num_heads=3,
        intermediate_size=40,
        vocab_size=101,
        max_positions=32,
        norm=norm,
        next_sentence=next_sentence,
        attention_dropout=0.0,
    )


def counted(model_config: ModelConfig, layers: int, backward: bool) -> int:
    """FLOPs of one pass over 4 sequences of 20 tokens, 3 predicted in each, with attention that the counter knows."""
    model = Bert(model_config, layers)
    positions = (torch.arange(4)[:, None] * 20 + torch.tensor([1, 7, 19])).flatten()
    inputs = {"next_sentence_labels": torch.zeros(4, dtype=torch.long)} if model_config.next_sentence else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(
            torch.ones(4, 20, dtype=torch.long),
            masked_positions=positions,
            labels=torch.ones_like(positions),
            **inputs,
        )
        if backward:
            (output.loss_sum + (output.next_sentence_loss_sum or 0)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("layers", [1, 3])
def test_formula_equals_the_counter(norm: str, next_sentence: bool, layers: int) -> None:
    model_config = config(norm, next_sentence)
    size = {"sequences": 4, "length": 20, "masked": 12}
    assert training_flops(model_config, layers, **size) == 3 * counted(model_config, layers, backward=False)
    assert training_flops(model_config, layers, **size) == counted(model_config, layers, backward=True)


def test_documents_are_counted_as_rows_of_their_own() -> None:
    """Sequences of 8 and 12 tokens cost what the counter finds in each, and so does one that holds both."""
    model_config = config("post", False)
    apart = sum(training_flops(model_config, 3, sequences=1, length=n, masked=3) for n in (8, 12))
    pairs = {"pairs": 8**2 + 12**2, "masked_pairs": 3 * (8 + 12)}
    assert training_flops(model_config, 3, sequences=1, length=20, masked=6, **pairs) == apart


def test_per_token_is_the_total_divided() -> None:
    model_config = config("pre", False)
    total = training_flops(model_config, 2, sequences=10, length=20, masked=30)
    assert training_flops_per_token(model_config, 2, length=20, masking_rate=0.15) == pytest.approx(total / 200)
