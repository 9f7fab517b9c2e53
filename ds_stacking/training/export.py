"""Hugging Face folders of a run: one per stage, `final` pointing at the last."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.files import explain_disk, whole_folder
from ds_stacking.common.own_files import make_inside, open_folder, open_inside
from ds_stacking.config import ModelConfig
from ds_stacking.data.prepared_data import PreparedData
from ds_stacking.engine.consolidate import gather_masters
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.models.convert import save_huggingface
from ds_stacking.reports.model_card import write_model_card
from ds_stacking.training.run_directory import EXPORT

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
FINAL = "final"


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
    The folder appears whole; one that stood there, from before a crash, is replaced. Raises RunFailed where the disk
    does not take it, and UserError for a link in the place of a folder of the run.
    """
    name = f"stage-{stage + 1}-{layers}L"
    try:
        if writes:
            folder = make_inside(run_dir, EXPORT) / name
            with whole_folder(folder, inside=run_dir, replace=True) as unfinished:
                save_huggingface(unfinished, tensors, model, layers, pad_token_id=data.special.pad)
                for file in TOKENIZER_FILES:
                    _copy(data.tokenizer_dir, file, unfinished)
    except OSError as error:
        raise explain_disk("The stage's model", run_dir / EXPORT / name, error) from error
    finally:
        for _ in tensors:
            pass


def try_export(
    run_dir: Path,
    stage: int,
    layers: int,
    manager: StageManager,
    model: ModelConfig,
    data: PreparedData,
    alive: Callable[[], None],
) -> Exception | None:
    """Export the current engine's weights; what is to be said where that failed on this rank. Collective.

    `alive` is called as they are gathered.
    """

    def masters() -> Iterator[tuple[str, Tensor]]:
        for item in gather_masters(manager.engine, manager.parameters):
            alive()
            yield item

    writes = dist.get_rank() == 0
    try:
        export_stage(run_dir, stage=stage, layers=layers, tensors=masters(), model=model, data=data, writes=writes)
    except (OSError, RunFailed, UserError) as fault:
        return fault
    return None


def finish_export(run_dir: Path, name: str, *, summary: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card of the last stage, whose folder is `name`, and point export/final at it.

    Raises UserError for a link in the place of a folder of the run, RunFailed where the disk does not take them.
    """
    folder = run_dir / EXPORT / name
    try:
        with open_folder(run_dir, EXPORT, name):
            write_model_card(folder, summary=summary, config=config)
        with open_folder(run_dir, EXPORT) as export:
            temporary = f".{FINAL}.{secrets.token_hex(8)}.tmp"
            os.symlink(name, temporary, target_is_directory=True, dir_fd=export)
            try:
                os.replace(temporary, FINAL, src_dir_fd=export, dst_dir_fd=export)
            except OSError:
                os.unlink(temporary, dir_fd=export)
                raise
    except IsADirectoryError:
        raise RunFailed(
            f"{folder.parent / FINAL} is a folder, and is to be a link to {name}; move it away and run the "
            f"same command again with --resume auto."
        ) from None
    except OSError as error:
        raise explain_disk("The model card", folder, error) from error


def _copy(source: Path, name: str, target: Path) -> None:
    """Copy a file, if it is there, never through a link."""
    try:
        handle = open_inside(source, name)
    except FileNotFoundError:
        return
    with open(handle, "rb") as file, (target / name).open("xb") as copy:
        shutil.copyfileobj(file, copy)
