"""Unpadded documents against padded ones: the same loss and gradients, and no document sees another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM

from ds_stacking.config import ModelConfig
from ds_stacking.data.batches import Batch
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import huggingface_names, to_huggingface
from ds_stacking.models.variants import bert_class

CONFIG = ModelConfig(
    hidden_size=24, num_heads=3, intermediate_size=40, vocab_size=101, max_positions=32, initializer_range=0.2
)
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


class Documents:
    """Documents of every length from 1 to 20, the first token and every third after it predicted."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.lengths = torch.randperm(20) + 1
        self.longest = 20
        self.real = torch.arange(20) < self.lengths[:, None]  # [documents, 20]
        self.padded = torch.randint(1, CONFIG.vocab_size, (20, 20)) * self.real
        self.labels = torch.where(self.real & (torch.arange(20) % 3 == 0), self.padded, -100)
        self.cu_seqlens = torch.cat([torch.zeros(1), self.lengths.cumsum(0)]).int()

    def packed(self) -> dict[str, Tensor | int]:
        """All of them as one sequence without padding."""
        labels = self.labels[self.real]
        positions = (labels >= 0).nonzero()[:, 0]
        return {
            "input_ids": self.padded[self.real][None],
            "masked_positions": positions,
            "labels": labels[positions],
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.longest,
        }


def loss_and_gradients(model: Bert, inputs: dict[str, Tensor | int]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss_sum / len(inputs["labels"])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def theirs(model: Bert, documents: Documents) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of transformers' model with the same weights on padded sequences."""
    hf_config, state = to_huggingface(model.named_parameters(), model.config, len(model.blocks))
    model_class = {BertConfig: BertForMaskedLM, MegatronBertConfig: MegatronBertForMaskedLM}[type(hf_config)]
    peer = model_class(hf_config)
    peer.load_state_dict(state, strict=False)
    loss = peer(documents.padded, attention_mask=documents.real.long(), labels=documents.labels).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in peer.named_parameters()}


def largest_difference(ours: dict[str, Tensor], expected: dict[str, Tensor], norm: str) -> float:
    """Largest difference of a gradient relative to its tensor's largest value."""
    differences = []
    for name, gradient in ours.items():
        reference = torch.cat([expected[part] for part in huggingface_names(name, norm)])
        differences.append(((gradient - reference).abs().max() / reference.abs().max()).item())
    return max(differences)


@BOTH
@NORMS
def test_unpadded_documents_equal_padded_sequences(norm: str, fused: bool) -> None:
    torch.manual_seed(0)
    model, documents = bert_class(fused)(replace(CONFIG, norm=norm), 3), Documents()
    want, expected = theirs(model, documents)
    got, gradients = loss_and_gradients(model, documents.packed())
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert largest_difference(gradients, expected, norm) < 1e-5
    # the test can tell: one document's end moved by one token
    wrong = documents.packed()
    wrong["cu_seqlens"][7] += 1
    assert abs(loss_and_gradients(model, wrong)[0] - want) > 1e-4


@BOTH
def test_a_sequence_may_hold_several_documents(fused: bool) -> None:
    """[3, 20] with bounds equals [1, 60] with the same bounds."""
    torch.manual_seed(0)
    model, ids = bert_class(fused)(CONFIG, 2), torch.randint(1, 101, (3, 20))
    inputs = {
        "masked_positions": torch.tensor([1, 2, 19, 20, 33, 59]),
        "labels": torch.arange(1, 7),
        "cu_seqlens": torch.tensor([0, 2, 3, 20, 40, 41, 60], dtype=torch.int32),
    }
    apart = loss_and_gradients(model, {"input_ids": ids, **inputs})
    stream = loss_and_gradients(model, {"input_ids": ids.view(1, 60), "max_seqlen": 20, **inputs})
    torch.testing.assert_close(apart, stream, rtol=1e-5, atol=1e-6)


@BOTH
@NORMS
def test_no_document_sees_another(norm: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = bert_class(fused)(replace(CONFIG, norm=norm), 2).eval()
    ids = torch.randint(1, 101, (1, 20))
    bounds = torch.tensor([0, 6, 13, 20], dtype=torch.int32)
    before = model(ids, cu_seqlens=bounds).hidden
    ids[0, 8] += 1
    changed = (model(ids, cu_seqlens=bounds).hidden != before).any(-1)[0]
    assert changed[6:13].all() and not changed[:6].any() and not changed[13:].any()


@BOTH
@NORMS
def test_the_last_block_of_predicted_tokens_is_that_of_all(norm: str, fused: bool) -> None:
    """Loss and gradients are those of a model that computes and scores every token."""
    torch.manual_seed(0)
    model, documents = bert_class(fused)(replace(CONFIG, norm=norm), 2), Documents()
    inputs = documents.packed()
    some = loss_and_gradients(model, inputs)
    every = dict(inputs, labels=torch.full((1, inputs["input_ids"].numel()), -100))
    every["labels"][0, inputs["masked_positions"]] = inputs["labels"]
    del every["masked_positions"]
    model.zero_grad()
    loss = model(**every).loss_sum / len(inputs["labels"])
    loss.backward()
    torch.testing.assert_close(some[0], loss.detach(), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(some[1][name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@NORMS
def test_fused_and_torch_agree_over_200_steps(norm: str) -> None:
    """The same losses step by step while they fall, with documents and without."""
    curves = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = bert_class(fused)(replace(CONFIG, norm=norm, initializer_range=0.05), 2)
        inputs = Documents().packed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(200):
            bounds = inputs if step % 2 else {k: v for k, v in inputs.items() if "seqlen" not in k}
            if not step % 2:
                ids = inputs["input_ids"][:, :200].view(10, 20)
                keep = inputs["masked_positions"] < 200
                bounds |= {"input_ids": ids, "masked_positions": inputs["masked_positions"][keep]}
                bounds["labels"] = inputs["labels"][keep]
            optimizer.zero_grad()
            loss = model(**bounds).loss_sum / len(bounds["labels"])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < curves[0][0] - 2
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-3)


def test_pairs_of_a_batch() -> None:
    """Counted one by one: which queries see which keys, and which of these queries are predicted."""
    bounds = [0, 3, 12, 24]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(bounds).diff())
    sees = document[:, None] == document
    positions = torch.tensor([0, 2, 5, 20])
    fields = {
        "input_ids": torch.zeros(2, 12),
        "masked_positions": positions,
        "labels": positions,
        "is_mask": positions,
    }
    apart = Batch(**fields, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert apart.pairs == (int(sees.sum()), int(sees[positions].sum()))
    assert Batch(**fields).pairs == (2 * 12 * 12, 4 * 12)
