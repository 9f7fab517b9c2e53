"""Conversion to and from Hugging Face, against transformers' own models."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    DistilBertConfig,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
)

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import from_huggingface, parameter_shapes, save_huggingface, to_huggingface

LAYERS = 3
HUGGING_FACE = {
    ("post", False): (BertConfig, BertForMaskedLM),
    ("post", True): (BertConfig, BertForPreTraining),
    ("pre", False): (MegatronBertConfig, MegatronBertForMaskedLM),
    ("pre", True): (MegatronBertConfig, MegatronBertForPreTraining),
}


def small_config(norm: str, next_sentence: bool = False, activation: str = "gelu") -> ModelConfig:
    return ModelConfig(
        hidden_size=24,
        num_heads=3,
        intermediate_size=40,
        vocab_size=101,
        max_positions=32,
        norm=norm,
        activation=activation,
        next_sentence=next_sentence,
        layer_norm_eps=1e-5,
    )


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter, biases and LayerNorm too, values that make a swapped or missing tensor visible."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (1.0 if parameter.dim() == 1 else 0.0))


def random_model(config: ModelConfig) -> Bert:
    model = Bert(config, LAYERS).eval()
    randomise(model)
    return model


def padded_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    lengths = torch.tensor([[20], [7], [13]])
    return {
        "input_ids": torch.randint(0, 101, (3, 20)),
        "attention_mask": (torch.arange(20) < lengths).long(),
        "token_type_ids": torch.randint(0, 2, (3, 20)),
    }


def their_logits(output) -> torch.Tensor:
    return output.prediction_logits if "prediction_logits" in output else output.logits


def assert_same_logits(model: Bert, theirs: torch.nn.Module) -> None:
    batch = padded_batch()
    with torch.no_grad():
        ours, reference = model(**batch), theirs.eval()(**batch)
    expected = their_logits(reference)
    real = batch["attention_mask"].bool()
    assert expected[real].std() > 0.5
    assert torch.allclose(ours.logits.view_as(expected)[real], expected[real], atol=1e-5, rtol=1e-5)
    if "seq_relationship_logits" in reference:
        assert torch.allclose(ours.next_sentence_logits, reference.seq_relationship_logits, atol=1e-5)


@pytest.mark.parametrize("next_sentence", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_saved_folder_loads_completely_with_equal_logits(tmp_path: Path, norm: str, next_sentence: bool) -> None:
    config = small_config(norm, next_sentence)
    model = random_model(config)
    save_huggingface(tmp_path, model.named_parameters(), config, LAYERS)
    auto_class = AutoModelForPreTraining if next_sentence else AutoModelForMaskedLM
    theirs, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is HUGGING_FACE[norm, next_sentence][1]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_tanh_activation_survives(tmp_path: Path, norm: str) -> None:
    config = small_config(norm, activation="gelu_tanh")
    model = random_model(config)
    save_huggingface(tmp_path, model.state_dict(), config, LAYERS)
    assert_same_logits(model, AutoModelForMaskedLM.from_pretrained(tmp_path))
    assert from_huggingface(tmp_path)[0] == config


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_their_model_converts_with_equal_logits(kind: tuple[str, bool], hidden_act: str) -> None:
    config_class, model_class = HUGGING_FACE[kind]
    hf_config = config_class(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        hidden_act=hidden_act,
        layer_norm_eps=1e-6,
    )
    theirs = model_class(hf_config)
    randomise(theirs)
    config, num_layers, state = from_huggingface(theirs)
    assert (config.norm, config.next_sentence, num_layers) == (*kind, LAYERS)
    model = Bert(config, num_layers, initialize=False).eval()
    model.load_state_dict(state)
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_round_trip_is_bitwise_equal(tmp_path: Path, kind: tuple[str, bool]) -> None:
    config = small_config(*kind)
    state = random_model(config).state_dict()
    save_huggingface(tmp_path, state, config, LAYERS)
    restored_config, num_layers, restored = from_huggingface(tmp_path)
    assert (restored_config, num_layers) == (config, LAYERS)
    assert list(restored) == list(state)
    assert all(torch.equal(restored[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_model_is_saved_in_shards_that_transformers_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    config = small_config("post", next_sentence=True)
    state = random_model(config).state_dict()
    largest = max(tensor.numel() for tensor in state.values()) * dtype.itemsize
    backwards = reversed(list(state.items()))  # whatever the order in which they come
    save_huggingface(tmp_path, backwards, config, LAYERS, dtype=dtype, shard_bytes=largest + 1000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / file).values()) <= largest + 1000
    theirs, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    restored_config, _, restored = from_huggingface(tmp_path)
    assert restored_config == config and restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name].to(dtype).float()) for name in state)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    config = small_config("pre")
    alive: list[weakref.ref] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in parameter_shapes(config, LAYERS).items():
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.randn(shape)
            alive.append(weakref.ref(tensor.untyped_storage()))
            yield name, tensor

    save_huggingface(tmp_path, stream(), config, LAYERS)


@pytest.mark.parametrize("fault", ["missing", "disk"])
def test_weights_are_saved_whole_or_not_at_all(tmp_path: Path, fault: str) -> None:
    config = small_config("post")

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in random_model(config).state_dict().items():
            if name == "mlm_head.bias":
                if fault == "missing":
                    continue
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield name, tensor

    with pytest.raises(UserError if fault == "missing" else OSError):
        save_huggingface(tmp_path, stream(), config, LAYERS, shard_bytes=9000)
    assert list(tmp_path.iterdir()) == []


def test_saved_type_is_selectable(tmp_path: Path) -> None:
    config = small_config("pre")
    state = random_model(config).state_dict()
    save_huggingface(tmp_path, state, config, LAYERS, dtype=torch.bfloat16)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    assert torch.equal(theirs.bert.embeddings.word_embeddings.weight, state["embeddings.word.weight"].bfloat16())


def test_swapped_query_and_key_are_noticed(tmp_path: Path) -> None:
    config = small_config("post")
    model = random_model(config)
    state = dict(model.state_dict())
    query, key, value = state["blocks.1.attention.qkv.weight"].chunk(3)
    state["blocks.1.attention.qkv.weight"] = torch.cat((key, query, value))
    state["blocks.1.attention.qkv.bias"] = model.blocks[1].attention.qkv.bias.detach().roll(config.hidden_size)
    save_huggingface(tmp_path, state, config, LAYERS)
    with pytest.raises(AssertionError):
        assert_same_logits(model, AutoModelForMaskedLM.from_pretrained(tmp_path))


def test_incomplete_or_foreign_weights_are_refused() -> None:
    config = small_config("post")
    state = dict(random_model(config).state_dict())
    with pytest.raises(UserError, match=r"embeddings.word.weight of shape .* does not belong"):
        to_huggingface(state, ModelConfig(hidden_size=48, vocab_size=101), LAYERS)
    with pytest.raises(UserError, match="blocks.2.* does not belong to a 2-layer model"):
        to_huggingface(state, config, LAYERS - 1)
    del state["mlm_head.bias"]
    with pytest.raises(UserError, match="mlm_head.bias is missing"):
        to_huggingface(state, config, LAYERS)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    tiny = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(UserError, match="BertForSequenceClassification"):
        from_huggingface(BertForSequenceClassification(BertConfig(**tiny)))
    DistilBertConfig(architectures=["DistilBertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DistilBertForMaskedLM"):
        from_huggingface(tmp_path)
    with pytest.raises(UserError, match="hidden_act is 'relu'"):
        from_huggingface(BertForMaskedLM(BertConfig(**tiny, hidden_act="relu")))


def test_folders_without_a_whole_model_are_refused(tmp_path: Path) -> None:
    config = small_config("post")
    with pytest.raises(UserError, match="has no config.json"):
        from_huggingface(tmp_path)
    save_huggingface(tmp_path, random_model(config).state_dict(), config, LAYERS)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks bert.encoder.layer.1.output.dense.weight"):
        from_huggingface(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        from_huggingface(tmp_path)


def test_parameter_shapes_match_the_model() -> None:
    config = small_config("pre", next_sentence=True)
    expected = {name: parameter.shape for name, parameter in Bert(config, LAYERS).named_parameters()}
    assert parameter_shapes(config, LAYERS) == expected
