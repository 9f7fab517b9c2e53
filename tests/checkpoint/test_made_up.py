"""Right checksums, made-up content: a sentence names checkpoint, file and field, and the older checkpoint is used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from ds_stacking.checkpoint.format import INDEX, MANIFEST
from ds_stacking.checkpoint.grow import grow_folder
from ds_stacking.checkpoint.select import find, find_together, newest_valid
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError
from ds_stacking.growth.state import TensorSlice
from tests.checkpoint.signed import MUTATIONS, TENSORS, header, put, record, sign, text
from tests.checkpoint.stores import IDENTITY, random_state, save, stored
from tests.growth.simulated import run_threads


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "run" / "checkpoints"
    save(folder, 100), save(folder, 200)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine.parent, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def test_signed_anew_a_checkpoint_is_valid(folder: Path) -> None:
    sign(folder / "step-200")
    assert newest_valid(folder, IDENTITY).notes == ()


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_made_up_is_named_and_the_older_one_used(folder: Path, name: str) -> None:
    mutate, words = MUTATIONS[name]
    mutate(folder / "step-200")
    found = newest_valid(folder)
    assert found is not None and found.step == 100
    (note,) = found.notes
    assert re.search(words, note) and str(folder / "step-200") in note and "\n" not in note and len(note) < 600, note
    with pytest.raises(UserError, match="cannot be loaded: ") as error:
        find(folder / "step-200")
    assert re.search(words, str(error.value)), error.value
    written, _ = grow_folder(folder.parent, folder.parents[1] / "grown", operator="stack", layers=4)
    assert CheckpointReader(written).step == 100
    with pytest.raises(UserError, match="cannot be loaded: "):
        grow_folder(folder / "step-200", folder.parents[1] / "more", operator="stack", layers=4)
    assert sorted(path.name for path in folder.parents[1].iterdir()) == ["grown", "run"]


def test_all_ranks_hear_of_it(folder: Path) -> None:
    header(lambda entries: {})(folder / "step-200")
    found = run_threads(3, lambda exchange: find_together(folder, exchange))
    assert [f.step for f in found] == [100] * 3 and f"the header of {TENSORS}" in found[0].notes[0]
    put("rank-00000.json", "numpy", 5)(folder / "step-100")

    def refused(exchange) -> str:
        with pytest.raises(UserError, match="holds no valid checkpoint") as error:
            find_together(folder, exchange)
        return str(error.value)

    said = run_threads(3, refused)
    assert said[0] == said[1] == said[2] and "numpy: " in said[0]


def test_not_a_number_is_data(tmp_path: Path) -> None:
    state = random_state(5)
    state.tensors["exp_avg"]["embedding"][3] = float("nan")
    path = save(tmp_path, 5, state, extra={"loss": float("nan")})
    assert newest_valid(tmp_path).path == path
    assert stored(path).tensors["exp_avg"]["embedding"][3].isnan()
    assert not torch.equal(stored(path).tensors["master"]["embedding"], torch.zeros(1009))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\xff" * 8, "is said to have"),
        ((2**60).to_bytes(8, "little"), "is said to have"),
        ((40).to_bytes(8, "little") + b"[" * 40, "is no JSON"),
        ((40).to_bytes(8, "little") + b'{"master/embedding/x-9":0}'.ljust(40), "names tensors that are none"),
        ((40).to_bytes(8, "little") + b'{"master/other/0-9":0}'.ljust(40), "holds 'other', which state.json"),
    ],
)
def test_headers_of_the_first_version(folder: Path, start: bytes, words: str) -> None:
    """There the headers alone say where what lies."""
    path = folder / "step-200"
    (path / INDEX).unlink()
    sign(path, version=1)
    assert CheckpointReader(path).step == 200
    text(TENSORS, start + (path / TENSORS).read_bytes()[len(start) :])(path)
    with pytest.raises(UserError, match=words):
        CheckpointReader(path)


def test_a_file_that_shrinks_later_is_one_sentence_too(folder: Path) -> None:
    reader = CheckpointReader(folder / "step-200")
    (folder / "step-200" / TENSORS).write_bytes(b"")
    with pytest.raises(UserError, match=f"{TENSORS} does not hold"):
        reader.read(TensorSlice("embedding", 0, 5), "master")


def test_links_are_not_followed(folder: Path) -> None:
    path = folder / "step-200"
    shutil.move(path / "state.json", folder.parents[1] / "elsewhere.json")
    (path / "state.json").symlink_to(folder.parents[1] / "elsewhere.json")
    with pytest.raises(UserError, match="is a link"):
        CheckpointReader(path)
    assert record(folder.parents[1] / "elsewhere.json")["size"] and (path / MANIFEST).is_file()
