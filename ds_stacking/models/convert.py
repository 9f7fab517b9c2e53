"""Weights to and from Hugging Face, exactly, in both directions.

| `ModelConfig`            | transformers class                                                                       |
|--------------------------|------------------------------------------------------------------------------------------|
| post-LN                  | `BertForMaskedLM`, with a next-sentence head `BertForPreTraining`                        |
| pre-LN                   | `MegatronBertForMaskedLM`, with a next-sentence head `MegatronBertForPreTraining`        |

Both sides hold the same numbers; they differ in names and in query, key and value, which are one tensor here and three
there. Shapes: D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from ds_stacking.common.errors import UserError
from ds_stacking.common.model_folder import CONFIG, check_folder, check_numbers, one_sentence, weight_files
from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import TOKEN_TYPES, Bert
from ds_stacking.models.shards import SHARD_BYTES, ShardWriter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Norm = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh"]
Tensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Our parameters: a state dict, or pairs of name and tensor."""

ARCHITECTURES: dict[tuple[Norm, bool], str] = {
    ("post", False): "BertForMaskedLM",
    ("post", True): "BertForPreTraining",
    ("pre", False): "MegatronBertForMaskedLM",
    ("pre", True): "MegatronBertForPreTraining",
}
"""The transformers class for (ModelConfig.norm, ModelConfig.next_sentence), whose import takes seconds."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""ModelConfig.activation for each name in transformers; the variants of one function differ by rounding only."""

FRESH = 50_000_000
"""Weights that a model may have beyond those of its folder: a classifier, a pooler."""

_OUTER_MODULES = {
    "embeddings.word": "bert.embeddings.word_embeddings",
    "embeddings.position": "bert.embeddings.position_embeddings",
    "embeddings.token_type": "bert.embeddings.token_type_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "final_norm": "bert.encoder.ln",
    "mlm_head": "cls.predictions",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "next_sentence_head.pooler": "bert.pooler.dense",
    "next_sentence_head.classifier": "cls.seq_relationship",
}
_BLOCK_MODULES = {
    "attention.out": "attention.output.dense",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
}
_BLOCK_NORMS: dict[Norm, dict[str, str]] = {
    "post": {"attention_norm": "attention.output.LayerNorm", "feed_forward_norm": "output.LayerNorm"},
    "pre": {"attention_norm": "attention.ln", "feed_forward_norm": "ln"},
}
_QKV = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))


def huggingface_names(name: str, norm: Norm) -> tuple[str, ...]:
    """Return the names in transformers of our parameter `name`: one, or for packed query, key and value three.

    Three tensors are the equal parts of ours along its first dimension, in this order.
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return (f"{_OUTER_MODULES[module]}.{kind}",)
    _, index, inner = module.split(".", 2)
    modules = _QKV if inner == "attention.qkv" else ((_BLOCK_MODULES | _BLOCK_NORMS[norm])[inner],)
    return tuple(f"bert.encoder.layer.{index}.{module}.{kind}" for module in modules)


def parameter_shapes(config: ModelConfig, num_layers: int) -> dict[str, torch.Size]:
    """Return name and shape of every parameter of `Bert(config, num_layers)`, in order, without allocating it."""
    with torch.device("meta"):
        model = Bert(config, num_layers, initialize=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _huggingface_shapes(config: ModelConfig, num_layers: int) -> Iterator[tuple[str, torch.Size]]:
    """Name and shape of every tensor in transformers, in the order of ours."""
    for name, shape in parameter_shapes(config, num_layers).items():
        names = huggingface_names(name, config.norm)
        for part in names:
            yield part, torch.Size((shape[0] // len(names), *shape[1:]))


def to_huggingface(
    tensors: Tensors,
    config: ModelConfig,
    num_layers: int,
    *,
    dtype: torch.dtype = torch.float32,
    pad_token_id: int = 0,
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Convert our parameters, a state dict or (name, tensor) pairs, into a transformers configuration and state dict.

    The state dict holds contiguous CPU tensors of `dtype`, which share memory with the given ones where these are such
    tensors already. The tied decoder is left out, as transformers does.
    Raises UserError where a parameter is missing, unknown or of another shape than `config` and `num_layers` say.
    """
    converted = {name: part.to("cpu", dtype).contiguous() for name, part in _converted(tensors, config, num_layers)}
    return _huggingface_config(config, num_layers, dtype, pad_token_id), converted


def _converted(tensors: Tensors, config: ModelConfig, num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under transformers' names, one after another: views of the given tensors."""
    shapes = parameter_shapes(config, num_layers)
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if tensor.shape != shapes.pop(name, None):
            raise UserError(
                f"Parameter {name} of shape {tuple(tensor.shape)} does not belong to a {num_layers}-layer model of "
                f"this configuration; convert weights together with the configuration they were trained with."
            )
        names = huggingface_names(name, config.norm)
        yield from zip(names, tensor.detach().chunk(len(names)), strict=True)
    if shapes:
        raise UserError(f"Parameter {next(iter(shapes))} is missing ({len(shapes)} in all); give the whole model.")


def save_huggingface(
    folder: str | Path,
    tensors: Tensors,
    config: ModelConfig,
    num_layers: int,
    *,
    dtype: torch.dtype = torch.float32,
    pad_token_id: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and model.safetensors, which `from_pretrained` loads; see `to_huggingface`.

    Above SHARD_BYTES there are several files and an index. Of pairs one is held at a time: a generator may make them.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    shapes = dict(_huggingface_shapes(config, num_layers))
    with ShardWriter(Path(folder), shapes, dtype, shard_bytes=shard_bytes) as writer:
        for name, part in _converted(tensors, config, num_layers):
            writer.write(name, part)
    _huggingface_config(config, num_layers, dtype, pad_token_id).save_pretrained(folder)


def from_huggingface(source: str | Path | PreTrainedModel) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Convert a transformers model, or a folder or hub name that holds one, to (configuration, layers, state dict).

    The state dict is fp32 on the CPU. Raises UserError for an architecture that `Bert` cannot represent.
    """
    model = _load(source) if isinstance(source, str | Path) else source
    norm, next_sentence = _architecture(type(model).__name__)
    config = _model_config(model.config, norm, next_sentence)
    num_layers = model.config.num_hidden_layers
    theirs = model.state_dict()
    ours = {}
    for name, shape in parameter_shapes(config, num_layers).items():
        parts = [theirs[part].to("cpu", torch.float32) for part in huggingface_names(name, norm)]
        ours[name] = torch.cat(parts)
        assert ours[name].shape == shape, name
    return config, num_layers, ours


def _huggingface_config(
    config: ModelConfig, num_layers: int, dtype: torch.dtype, pad_token_id: int
) -> PreTrainedConfig:
    config_class = transformers.MegatronBertConfig if config.norm == "pre" else transformers.BertConfig
    return config_class(
        architectures=[ARCHITECTURES[config.norm, config.next_sentence]],
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        hidden_act="gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "gelu",
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        max_position_embeddings=config.max_positions,
        type_vocab_size=TOKEN_TYPES,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=pad_token_id,
    )


def _model_config(hf_config: PreTrainedConfig, norm: Norm, next_sentence: bool) -> ModelConfig:
    unsupported = {
        "hidden_act": hf_config.hidden_act not in ACTIVATIONS,
        "type_vocab_size": hf_config.type_vocab_size != TOKEN_TYPES,
        "is_decoder": hf_config.is_decoder,
        "tie_word_embeddings": not hf_config.tie_word_embeddings,
        "position_embedding_type": getattr(hf_config, "position_embedding_type", "absolute") != "absolute",
    }
    for name, refused in unsupported.items():
        if refused:
            raise UserError(
                f"The model's {name} is {getattr(hf_config, name)!r}, which this encoder cannot represent; choose a "
                f"BERT with GELU, {TOKEN_TYPES} token types, absolute positions and a tied decoder."
            )
    return ModelConfig(
        hidden_size=hf_config.hidden_size,
        num_heads=hf_config.num_attention_heads,
        intermediate_size=hf_config.intermediate_size,
        vocab_size=hf_config.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        norm=norm,
        activation=ACTIVATIONS[hf_config.hidden_act],
        dropout=hf_config.hidden_dropout_prob,
        attention_dropout=hf_config.attention_probs_dropout_prob,
        layer_norm_eps=hf_config.layer_norm_eps,
        initializer_range=hf_config.initializer_range,
        next_sentence=next_sentence,
    )


def _architecture(name: str) -> tuple[Norm, bool]:
    for key, known in ARCHITECTURES.items():
        if known == name:
            return key
    raise UserError(
        f"The model is a {name}, which cannot be converted; give one of {', '.join(ARCHITECTURES.values())}."
    )


def check_weights(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Raise UserError where the model that `build` makes is far larger than the weights in `folder`.

    What config.json says then decides about no memory: heads without weights, which are made fresh, are small.
    """
    with one_sentence(f"The safetensors files of {folder} are damaged"):
        stored = 0
        for path in weight_files(folder).values():
            with safe_open(path, framework="pt") as opened:
                stored += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    with one_sentence(f"{folder / CONFIG} describes no model"), torch.device("meta"):
        needed = sum(parameter.numel() for parameter in build().parameters())
    if needed > 2 * stored + FRESH:
        raise UserError(
            f"{folder / CONFIG} describes a model of {needed:,} weights, but its safetensors files hold {stored:,}; "
            f"give complete weights, and the configuration that they belong to."
        )


def _load(source: str | Path) -> PreTrainedModel:
    folder = Path(source)
    if folder.is_dir():
        check_folder(folder)
    with one_sentence(f"{source} holds no transformers model"):
        hf_config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_numbers(hf_config.to_dict(), str(source))
        architecture = (hf_config.architectures or [type(hf_config).__name__])[0]
    # Any: transformers' annotation leaves out that loading info makes the result a pair.
    model_class: Any = getattr(transformers, ARCHITECTURES[_architecture(architecture)])
    if folder.is_dir():
        check_weights(folder, lambda: model_class(hf_config))
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with one_sentence(f"{source} holds no weights in the safetensors format"):
        model, info = model_class.from_pretrained(source, trust_remote_code=False, **options)
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        raise UserError(f"{source} says it is a {architecture} but lacks {missing}; give complete weights.")
    return model
