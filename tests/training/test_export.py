"""A stage's folder appears whole, and every rank goes through what is gathered for it, whatever happens on one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import from_huggingface
from ds_stacking.training import export
from ds_stacking.training.export import export_stage, finish_export

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
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_huggingface", full)
    gathered = Gathered()
    with pytest.raises(RunFailed, match="stage-1-2L: No space left on device; free space on its disk"):
        write(tmp_path, gathered)
    assert gathered.read == len(gathered.weights)
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("name", ["export", "export/stage-1-2L"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir(), (run_dir / name).parent.mkdir(parents=True)
    (elsewhere / "config.json").write_text('{"num_hidden_layers": 2}')
    (run_dir / name).symlink_to(elsewhere)
    gathered = Gathered()
    if name == "export":
        with pytest.raises(UserError, match="is a link"):
            write(run_dir, gathered)
        assert gathered.read == len(gathered.weights)
    with pytest.raises(UserError, match="is a link"):
        finish_export(run_dir, "stage-1-2L", summary={}, config={"name": "x"})
    if name != "export":
        write(run_dir, gathered)  # a link in the place of the new folder goes
        assert not (run_dir / name).is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["config.json"]


def test_a_tokenizer_is_not_copied_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="vocab.txt is a link"):
        write(tmp_path, Gathered())
    assert list((tmp_path / "export").iterdir()) == []


def test_final_is_a_link_that_is_replaced_and_no_other_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "write_model_card", lambda folder, **_: (folder / "README.md").write_text("card"))
    write(tmp_path, Gathered())
    final = tmp_path / "export" / "final"
    for _ in range(2):
        finish_export(tmp_path, "stage-1-2L", summary={}, config={})
        assert os.readlink(final) == "stage-1-2L" and (final / "README.md").read_text() == "card"
    final.unlink()
    (tmp_path / "precious").write_text("x")
    final.symlink_to(tmp_path / "precious")
    finish_export(tmp_path, "stage-1-2L", summary={}, config={})
    assert os.readlink(final) == "stage-1-2L" and (tmp_path / "precious").read_text() == "x"
    final.unlink(), final.mkdir()
    with pytest.raises(RunFailed, match="final is a folder, and is to be a link"):
        finish_export(tmp_path, "stage-1-2L", summary={}, config={})
    shutil.rmtree(final)
    finish_export(tmp_path, "stage-1-2L", summary={}, config={})
    assert sorted(path.name for path in final.parent.iterdir()) == ["final", "stage-1-2L"]
