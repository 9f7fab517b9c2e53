"""Hugging Face folders of a run: one per stage, `final` pointing at the last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_stacking.config import ModelConfig
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.models.convert import save_huggingface
from ds_stacking.reports.model_card import write_model_card

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def export_stage(
    run_dir: Path,
    *,
    stage: int,
    layers: int,
    tensors: Iterator[tuple[str, Tensor]],
    model: ModelConfig,
    data: PreparedData,
    writes: bool,
) -> None:
    """Where this rank `writes`: export/stage-<n>-<layers>L with weights and tokenizer, which `from_pretrained` loads.

    `tensors` is gathered while it is read, so every rank reads it to the end, also after the disk failed on one.
    The folder appears whole; one that stood there, from before a crash, is replaced.
    """
    try:
        if writes:
            folder = run_dir / "export" / f"stage-{stage + 1}-{layers}L"
            with _appearing(folder) as unfinished:
                save_huggingface(unfinished, tensors, model, layers, pad_token_id=data.special.pad)
                for name in TOKENIZER_FILES:
                    if (data.tokenizer_dir / name).is_file():
                        shutil.copyfile(data.tokenizer_dir / name, unfinished / name)
    finally:
        for _ in tensors:
            pass


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which has the name `folder` afterwards, or is gone where the body failed."""
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def finish_export(folder: Path, *, summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card of the last stage and point export/final at it."""
    write_model_card(folder, summary=summary, config=config)
    final = folder.parent / "final"
    final.unlink(missing_ok=True)
    final.symlink_to(folder.name, target_is_directory=True)
