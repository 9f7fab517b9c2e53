"""The held-out loss against its definition, whatever the ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ds_stacking.config import ModelConfig
from ds_stacking.data.batches import EvalBatches
from ds_stacking.data.masking import Masker
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SpecialIds
from ds_stacking.models.bert import Bert
from ds_stacking.training.held_out import held_out_loss
from tests.ranks import run_ranks

SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, all_ids=(0, 1, 2, 3, 4))
BLOCKS, LENGTH, VOCABULARY = 21, 16, 60


def batches() -> EvalBatches:
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, 2000).astype(np.uint16)
    split = Split(files=[TokenFile(tokens=tokens, offsets=np.array([0, len(tokens)]))])
    return EvalBatches(
        split,
        sequences=BLOCKS,
        sequence_length=LENGTH,
        masking_rate=0.3,
        masker=Masker(special=SPECIAL, vocab_size=VOCABULARY),
        special=SPECIAL,
    )


def model() -> Bert:
    torch.manual_seed(3)
    config = ModelConfig(hidden_size=16, num_heads=2, vocab_size=VOCABULARY, max_positions=LENGTH, dropout=0.3)
    return Bert(config, 2, initialize=True)


def measure(micro_batch_size: int, shuffled: bool) -> tuple[float, float, bool]:
    bert = model().train()
    state = torch.get_rng_state()
    loss = held_out_loss(
        bert, batches(), micro_batch_size=micro_batch_size, device=torch.device("cpu"), shuffled=shuffled
    )
    return loss.all_positions, loss.masked, bert.training and torch.equal(state, torch.get_rng_state())


@pytest.fixture(scope="module")
def expected() -> tuple[float, float]:
    """All blocks at once, with the model's full logits and PyTorch's own cross entropy."""
    batch = batches().batch(np.arange(BLOCKS))
    with torch.no_grad():
        logits = model().eval()(batch.input_ids).logits[batch.masked_positions]
    losses = F.cross_entropy(logits.double(), batch.labels, reduction="none")
    return losses.mean().item(), losses[batch.is_mask].mean().item()


@pytest.mark.parametrize("micro_batch_size", [1, 4, 50])
def test_the_loss_is_the_mean_over_tokens(expected: tuple[float, float], micro_batch_size: int) -> None:
    every, masked, unchanged = measure(micro_batch_size, False)
    assert (every, masked) == pytest.approx(expected, rel=1e-5)
    assert unchanged, "evaluation must leave the mode and the generators as they were"
    assert every != masked


def test_shuffled_blocks_are_other_input(expected: tuple[float, float]) -> None:
    assert measure(4, True)[1] != pytest.approx(expected[1], rel=1e-3)


@pytest.mark.distributed
def test_ranks_share_the_blocks(expected: tuple[float, float]) -> None:
    """21 blocks over 2 ranks in micro-batches of 4, and over 4 ranks of which some have none left."""
    for world_size, micro_batch_size in ((2, 4), (4, 5)):
        for every, masked, _ in run_ranks(world_size, measure, micro_batch_size, False):
            assert (every, masked) == pytest.approx(expected, rel=1e-5)
