"""Hugging Face encoders: loaded whole, in fp32 and without running code that comes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ds_stacking.common.errors import UserError
from ds_stacking.common.model_folder import check_folder, check_numbers, means_a_folder, one_sentence
from ds_stacking.models.convert import check_weights


def quiet() -> None:
    """Keep transformers from a progress bar and a report of missing heads for every model."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_config(source: str | Path, **options: Any) -> PreTrainedConfig:
    """The configuration of a model in a folder or on the hub. Raises UserError where there is none."""
    text = str(source)
    if not text.strip():
        raise UserError("--model is empty; give a folder or a hub name.")
    if not Path(text).is_dir() and (means_a_folder(text) or Path(text).exists()):
        raise UserError(f"The folder {text} does not exist; give --model a folder or a hub name.")
    if Path(text).is_dir():
        check_folder(Path(text))
    with one_sentence(f"{text} holds no transformers model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        values = config.to_dict()
    check_numbers(values, text)
    return config


def load_model(auto: Any, source: str | Path, **options: Any) -> PreTrainedModel:
    """The model of `auto`, a class such as AutoModel; a head that has no weights is fresh by the random state.

    Raises UserError where there is no such model, or weights of the encoder itself are missing.
    """
    config = load_config(source)
    if Path(source).is_dir():
        check_weights(Path(source), lambda: auto.from_config(options.get("config", config)))
    with one_sentence(f"{source} cannot be loaded"):
        model, info = auto.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
        encoder = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    missing = sorted(name for name in info["missing_keys"] if name.startswith(encoder) and "pooler" not in name)
    if missing:
        raise UserError(f"{source} lacks {missing[0]} ({len(missing)} weights in all); give complete weights.")
    return model
