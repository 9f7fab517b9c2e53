"""Hugging Face folders of a run: one per stage, `final` pointing at the last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_stacking.common.own_files import make_inside, open_folder
from ds_stacking.config import ModelConfig
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.models.convert import save_huggingface
from ds_stacking.reports.model_card import write_model_card
from ds_stacking.training.run_directory import EXPORT

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
            folder = make_inside(run_dir, EXPORT) / f"stage-{stage + 1}-{layers}L"
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
    unfinished.mkdir()
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def finish_export(run_dir: Path, name: str, *, summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card of the last stage, whose folder is `name`, and point export/final at it."""
    with open_folder(run_dir, EXPORT, name):  # which refuses links
        write_model_card(run_dir / EXPORT / name, summary=summary, config=config)
    with open_folder(run_dir, EXPORT) as export:
        with suppress(FileNotFoundError):
            os.unlink("final", dir_fd=export)
        os.symlink(name, "final", target_is_directory=True, dir_fd=export)
