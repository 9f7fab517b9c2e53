"""Hugging Face folders of a run: one per stage, `final` pointing at the last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_stacking.config import ModelConfig
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.models.convert import save_huggingface
from ds_stacking.reports.model_card import write_model_card

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def export_stage(
    run_dir: Path, *, stage: int, layers: int, tensors: Mapping[str, Tensor], model: ModelConfig, data: PreparedData
) -> Path:
    """Write export/stage-<n>-<layers>L with weights and tokenizer; `from_pretrained` loads it."""
    folder = run_dir / "export" / f"stage-{stage + 1}-{layers}L"
    save_huggingface(folder, tensors, model, layers, pad_token_id=data.special.pad)
    for name in TOKENIZER_FILES:
        if (data.tokenizer_dir / name).is_file():
            shutil.copyfile(data.tokenizer_dir / name, folder / name)
    return folder


def finish_export(folder: Path, *, summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card of the last stage and point export/final at it."""
    write_model_card(folder, summary=summary, config=config)
    final = folder.parent / "final"
    final.unlink(missing_ok=True)
    final.symlink_to(folder.name, target_is_directory=True)
