"""A stage's folder appears whole, and every rank goes through what is gathered for it, whatever happens on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import from_huggingface
from ds_stacking.training import export
from ds_stacking.training.export import export_stage

MODEL = ModelConfig(hidden_size=24, num_heads=3, vocab_size=101, max_positions=16)


class Gathered:
    """Weights that come one by one, as from all ranks; counts how many were asked for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weights = {name: p.detach() for name, p in Bert(MODEL, 2).named_parameters()}
        self.read = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for item in self.weights.items():
            self.read += 1
            yield item


def write(run_dir: Path, gathered: Gathered, *, writes: bool = True) -> None:
    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    data = SimpleNamespace(special=SimpleNamespace(pad=0), tokenizer_dir=tokenizer)
    export_stage(run_dir, stage=0, layers=2, tensors=iter(gathered), model=MODEL, data=data, writes=writes)


def test_it_replaces_what_stood_there(tmp_path) -> None:
    old = tmp_path / "export" / "stage-1-2L"
    old.mkdir(parents=True)
    (old / "half.safetensors").write_text("")
    gathered = Gathered()
    write(tmp_path, gathered)
    assert [path.name for path in old.parent.iterdir()] == ["stage-1-2L"]
    assert {path.name for path in old.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    _, layers, weights = from_huggingface(old)
    assert layers == 2 and all(torch.equal(weights[name], value) for name, value in gathered.weights.items())


def test_ranks_that_do_not_write_take_part(tmp_path) -> None:
    gathered = Gathered()
    write(tmp_path, gathered, writes=False)
    assert gathered.read == len(gathered.weights) and not (tmp_path / "export").exists()


def test_after_a_full_disk_the_rest_is_gathered_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    """Else the other ranks would wait in a collective call for this one."""

    def full(folder, tensors, *args, **options) -> None:
        next(tensors)
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_huggingface", full)
    gathered = Gathered()
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, gathered)
    assert gathered.read == len(gathered.weights)
    assert list((tmp_path / "export").iterdir()) == []
