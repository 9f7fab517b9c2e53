"""The model itself: loss, gradients and outputs against transformers, and the invariants the trainer relies on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, MegatronBertConfig, MegatronBertForPreTraining

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert, BertOutput
from ds_stacking.models.convert import huggingface_names, to_huggingface

CONFIG = ModelConfig(
    hidden_size=24,
    num_heads=3,
    intermediate_size=40,
    vocab_size=101,
    max_positions=32,
    dropout=0.0,
    attention_dropout=0.0,
    initializer_range=0.2,
)
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def batch(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    """Three padded sequences with 9 masked tokens; ids from 1: transformers gives its padding row 0 no gradient."""
    torch.manual_seed(5)
    length = 20
    values = {
        "input_ids": torch.randint(1, config.vocab_size, (3, length)),
        "attention_mask": (torch.arange(length) < torch.tensor([[20], [7], [13]])).long(),
        "token_type_ids": torch.randint(0, 2, (3, length)),
        "masked_positions": torch.tensor([1, 5, 19, 21, 24, 26, 41, 44, 52]),
        "labels": torch.randint(1, config.vocab_size, (9,)),
    }
    if config.next_sentence:
        values["next_sentence_labels"] = torch.tensor([0, 1, 1])
    return values


def gradients(model: Bert, inputs: dict[str, Tensor]) -> tuple[BertOutput, dict[str, Tensor]]:
    """Gradients of the mean loss per masked token plus, where there is one, the mean loss per sequence."""
    output = model(**inputs)
    loss = output.loss_sum / len(inputs["labels"])
    if output.next_sentence_loss_sum is not None:
        loss = loss + output.next_sentence_loss_sum / len(inputs["input_ids"])
    loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def their_gradients(model: Bert, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of transformers' model with the same weights, which is told the labels its own way."""
    hf_config, state = to_huggingface(model.named_parameters(), model.config, len(model.blocks))
    model_class = {BertConfig: BertForPreTraining, MegatronBertConfig: MegatronBertForPreTraining}[type(hf_config)]
    theirs = model_class(hf_config)
    theirs.load_state_dict(state, strict=False)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels.view(-1)[inputs["masked_positions"]] = inputs["labels"]
    shared = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    loss = theirs(**shared, labels=labels, next_sentence_label=inputs["next_sentence_labels"]).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in theirs.named_parameters()}


@NORMS
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_loss_and_gradients_equal_transformers(norm: str, activation: str) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, norm=norm, activation=activation, next_sentence=True)
    model = Bert(config, 3)
    inputs = batch(config)
    their_loss, expected = their_gradients(model, inputs)
    output, ours = gradients(model, inputs)
    our_loss = output.loss_sum / 9 + output.next_sentence_loss_sum / 3
    assert our_loss.item() == pytest.approx(their_loss, rel=1e-6)
    for name, gradient in ours.items():
        reference = torch.cat([expected[part] for part in huggingface_names(name, norm)])
        scale = reference.abs().max().item()
        assert scale > 0, name
        assert torch.allclose(gradient, reference, rtol=1e-4, atol=1e-5 * scale), name


@NORMS
@pytest.mark.parametrize("next_sentence", [False, True])
def test_masked_rows_equal_the_full_head(norm: str, next_sentence: bool) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, norm=norm, next_sentence=next_sentence)
    model, inputs = Bert(config, 2).eval(), batch(config)
    masked, labels = inputs.pop("masked_positions"), inputs.pop("labels")
    full = model(**inputs)
    some = model(**inputs, masked_positions=masked, labels=labels)
    assert full.hidden.shape == (3, 20, 24)
    assert full.loss_sum is None
    assert torch.allclose(some.logits, full.logits[masked], atol=1e-5)
    assert torch.allclose(some.hidden, full.hidden.flatten(0, 1)[masked], atol=1e-5)
    expected = -full.logits[masked].double().log_softmax(-1)[torch.arange(9), labels]
    assert torch.allclose(some.token_losses.double(), expected, atol=1e-5)
    assert some.loss_sum.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert (some.next_sentence_logits is not None) == next_sentence
    if next_sentence:
        assert torch.allclose(some.next_sentence_logits, full.next_sentence_logits, atol=1e-5)


def test_labels_of_all_positions_may_be_ignored() -> None:
    torch.manual_seed(0)
    model, inputs = Bert(CONFIG, 2).eval(), batch()
    expected = model(**inputs).loss_sum
    masked, values = inputs.pop("masked_positions"), inputs.pop("labels")
    labels = torch.full((3, 20), -100)
    labels.view(-1)[masked] = values
    output = model(**inputs, labels=labels)
    assert torch.allclose(output.loss_sum, expected)
    assert output.token_losses.count_nonzero() == 9


@NORMS
def test_gradient_checkpointing_repeats_the_same_dropout(norm: str) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = replace(CONFIG, norm=norm, dropout=0.3, attention_dropout=0.3, gradient_checkpointing=checkpointing)
        model = Bert(config, 3).train()
        results.append(gradients(model, batch()))
    (plain, expected), (recomputed, actual) = results
    assert torch.equal(plain.loss_sum, recomputed.loss_sum)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = Bert(replace(CONFIG, **{kind: 0.5}), 2), batch()
    trained = [model.train()(**inputs).loss_sum for _ in range(2)]
    assert not torch.equal(*trained)
    evaluated = [model.eval()(**inputs).loss_sum for _ in range(2)]
    assert torch.equal(*evaluated)


@NORMS
def test_bf16_stays_near_fp32(norm: str) -> None:
    torch.manual_seed(0)
    model = Bert(replace(CONFIG, norm=norm, initializer_range=0.05), 2)
    exact, expected = gradients(model, batch())
    model.zero_grad()
    output, actual = gradients(model.bfloat16(), batch())
    assert output.logits.dtype == output.hidden.dtype == torch.bfloat16
    assert output.loss_sum.dtype == output.token_losses.dtype == torch.float32
    assert output.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=1e-2)
    for name, gradient in actual.items():
        reference = expected[name].flatten()
        assert torch.cosine_similarity(gradient.float().flatten(), reference, dim=0) > 0.99, name


def test_initialisation_follows_the_seed_and_the_range() -> None:
    config = replace(CONFIG, hidden_size=48, initializer_range=0.02, next_sentence=True)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(Bert(config, 2))
    first, same, other = (model.state_dict() for model in models)
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name])
            assert tensor.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("norm.weight")))), name


def test_uninitialised_model_draws_nothing_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Bert(CONFIG, 2)
    generator_state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", lambda *args, **kwargs: pytest.fail("weights were drawn"))
        patch.setattr(torch.Tensor, "uniform_", lambda *args, **kwargs: pytest.fail("weights were drawn"))
        empty = Bert(CONFIG, 2, initialize=False)
    assert torch.equal(torch.get_rng_state(), generator_state)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(**batch()).logits, model.eval()(**batch()).logits)


@NORMS
def test_blocks_have_equal_few_parameters(norm: str) -> None:
    model = Bert(replace(CONFIG, norm=norm), 3)
    shapes = [{name: tensor.shape for name, tensor in block.named_parameters()} for block in model.blocks]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len(shapes[0]) == 12
    assert shapes[0]["attention.qkv.weight"] == (72, 24)
    assert model.num_parameters == sum(tensor.numel() for tensor in model.state_dict().values())


@NORMS
def test_weight_decay_spares_biases_and_layer_norms(norm: str) -> None:
    model = Bert(replace(CONFIG, norm=norm, next_sentence=True), 2)
    vectors = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}  # what does not decay
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert vectors == biases | norms


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="vocab_size is 0"):
        Bert(replace(CONFIG, vocab_size=0), 2)
    with pytest.raises(UserError, match="0 layers"):
        Bert(CONFIG, 0)


def test_forward_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    model, inputs = Bert(replace(CONFIG, dropout=0.1, attention_dropout=0.1), 1), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5)
    compiled.train()(**inputs).loss_sum.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
