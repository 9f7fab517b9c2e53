"""Damage is never silent: each kind with what must be said, and the checkpoint that is used instead."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_stacking.checkpoint.format import INDEX
from ds_stacking.checkpoint.index import index_bytes
from ds_stacking.checkpoint.manifest import Unusable, read_manifest
from ds_stacking.checkpoint.select import find, find_together, newest_valid
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.verify import verify
from ds_stacking.common.errors import UserError
from ds_stacking.growth.exchange import OneRank
from tests.checkpoint.stores import IDENTITY, equal, random_state, save, stored
from tests.growth.simulated import run_threads

TENSORS = "rank-00000.safetensors"


class Bomb:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, path: Path) -> None:
        self.trace = path.parents[1] / "exploded"

    def __reduce__(self) -> tuple:
        return open, (str(self.trace), "w")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def edit_manifest(path: Path, resign: bool = True, **changes) -> None:
    """Change the manifest; with `resign` its own checksum is made right again."""
    from ds_stacking.checkpoint.manifest import checksum

    content = json.loads((path / "manifest.json").read_text())
    content |= changes
    if resign:
        content.pop("sha256")
        content["sha256"] = checksum(content)
    (path / "manifest.json").write_text(json.dumps(content))


def replace_by_link(file: Path) -> None:
    shutil.copy(file, file.parents[2] / "elsewhere")
    file.unlink()
    file.symlink_to(file.parents[2] / "elsewhere")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "flipped bit in a tensor": (lambda p: flip(p / TENSORS, -7), "sha256 differs"),
    "flipped bit in a header": (lambda p: flip(p / TENSORS, 40), "sha256 differs"),
    "flipped bit in state.json": (lambda p: flip(p / "state.json", 12), "sha256 differs"),
    "flipped bit in the generators": (lambda p: flip(p / "rank-00000.json", 99), "sha256 differs"),
    "truncated piece": (lambda p: os.truncate(p / TENSORS, 5000), "has 5000 bytes instead of"),
    "empty piece": (lambda p: os.truncate(p / TENSORS, 0), "has 0 bytes instead of"),
    "missing piece": (lambda p: (p / TENSORS).unlink(), f"{TENSORS} is missing"),
    "missing state.json": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "empty manifest": (
        lambda p: os.truncate(p / "manifest.json", 0),
        "manifest.json is damaged or no such file: it",
    ),
    "half a manifest": (
        lambda p: os.truncate(p / "manifest.json", 300),
        "manifest.json is damaged or no such file: it",
    ),
    "manifest of bytes": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "it is no JSON"),
    "manifest of something else": (
        lambda p: (p / "manifest.json").write_text("[1]"),
        "an object, and is [1]",
    ),
    "endlessly nested manifest": (lambda p: (p / "manifest.json").write_text("[" * 200_000), "it is no JSON"),
    "changed manifest": (lambda p: edit_manifest(p, resign=False, sequence=9), "manifest.json was changed"),
    "other format version": (lambda p: edit_manifest(p, version=3), "it has format version 3"),
    "manifest without files": (
        lambda p: edit_manifest(p, files=None),
        "files: input should be an object",
    ),
    "manifest that names other files": (
        lambda p: edit_manifest(p, files={"../../secret": {"size": 1, "sha256": "0" * 64}}),
        "'../../secret', which is no file of a checkpoint",
    ),
    "unknown architecture": (
        lambda p: edit_manifest(p, identity={"recipe": "tiny"}),
        "it is of another run: model.layers is None there and 2 here",
    ),
    "step of another": (lambda p: edit_manifest(p, step=7), "manifest.json is of step 7"),
    "foreign file": (lambda p: (p / "notes.txt").write_text("x"), "notes.txt does not belong to it"),
    "foreign directory": (lambda p: (p / "more").mkdir(), "more does not belong to it"),
    "malicious pickle beside": (
        lambda p: (p / "optimizer.pt").write_bytes(pickle.dumps(Bomb(p))),
        "optimizer.pt does not belong to it",
    ),
    "malicious pickle inside": (lambda p: (p / TENSORS).write_bytes(pickle.dumps(Bomb(p))), "bytes instead of"),
    "piece that is a link": (lambda p: replace_by_link(p / TENSORS), f"{TENSORS} is no ordinary file"),
    "piece that is a pipe": (lambda p: replace_by_pipe(p / TENSORS), f"{TENSORS} is no ordinary file"),
    "manifest that is a pipe": (lambda p: replace_by_pipe(p / "manifest.json"), "manifest.json is no regular file"),
    "other recipe": (
        lambda p: edit_manifest(p, identity=IDENTITY | {"recipe": "huge"}),
        "it is of another run: recipe is 'huge' there and 'tiny' here",
    ),
    "other architecture": (
        lambda p: edit_manifest(p, identity=IDENTITY | {"model": {"layers": 2, "width": 60}}),
        "it is of another run: model.width is 60 there and 30 here",
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    save(folder, 100), save(folder, 200)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_of_the_first_version_is_read(tmp_path, world_size) -> None:
    """It has no index; where its pieces lie stands in the headers of its files."""
    path = run_threads(world_size, lambda exchange: save(tmp_path, 5, random_state(5), exchange))[0]
    (path / INDEX).unlink()
    files = {name: record._asdict() for name, record in read_manifest(path).files.items() if name != INDEX}
    edit_manifest(path, version=1, files=files)
    assert newest_valid(tmp_path, IDENTITY).notes == ()
    assert equal(stored(path), random_state(5))
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content.replace(b"exp_avg/embedding/0-", b"exp_avg/embedding/1-"))
    with pytest.raises(UserError, match="another layout"):
        CheckpointReader(path)


INDEX_FAULTS = {
    "a piece is missing": (lambda rows: rows[1:], "does not hold all of embedding"),
    "a piece begins too late": (lambda rows: [[0, 1, *rows[0][2:]], *rows[1:]], "does not hold all of embedding"),
    "a piece is there twice": (lambda rows: [*rows, rows[0]], "does not hold all of embedding"),
    "an unknown parameter": (lambda rows: [[9, *rows[0][1:]], *rows[1:]], "pieces are of unknown parameters"),
    "an unknown file": (lambda rows: [[*rows[0][:3], 3], *rows[1:]], "pieces are in unknown files"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_cannot_be_right_is_refused(folder, fault) -> None:
    path = folder / "step-200"
    rows = load_file(path / INDEX)["pieces"].tolist()
    change, reason = INDEX_FAULTS[fault]
    (path / INDEX).write_bytes(index_bytes([change(rows)]))
    with pytest.raises(UserError, match=reason):
        CheckpointReader(path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_used_and_one_line_says_why(folder, damage) -> None:
    assert newest_valid(folder, IDENTITY).step == 200 and newest_valid(folder, IDENTITY).notes == ()
    inflict, reason = DAMAGES[damage]
    inflict(folder / "step-200")
    found = newest_valid(folder, IDENTITY)
    assert (found.step, found.path) == (100, folder / "step-100")
    assert len(found.notes) == 1 and reason in found.notes[0] and str(folder / "step-200") in found.notes[0]
    assert "\n" not in found.notes[0]
    assert equal(stored(found.path), random_state(100))
    with pytest.raises(UserError, match="cannot be loaded"):
        find(folder / "step-200", IDENTITY)
    assert not (folder.parent / "exploded").exists()


def test_the_bomb_is_one(folder) -> None:
    DAMAGES["malicious pickle beside"][0](folder / "step-200")
    pickle.loads((folder / "step-200" / "optimizer.pt").read_bytes()).close()
    assert (folder.parent / "exploded").exists()


def test_with_none_left_it_is_an_error_and_never_a_restart(folder) -> None:
    flip(folder / "step-100" / TENSORS, -1)
    (folder / "step-200" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no valid checkpoint") as error:
        newest_valid(folder, IDENTITY)
    assert "step-100 is skipped" in str(error.value) and "step-200 is skipped" in str(error.value)


@pytest.mark.parametrize("name", ["latest", "global_step6", "step-", "step-3.bak"])
def test_foreign_entries_are_named(folder, name) -> None:
    (folder / name).mkdir()
    found = newest_valid(folder, IDENTITY)
    assert found.step == 200 and found.notes == (f"{folder / name} is passed over: it is no checkpoint.",)
    shutil.rmtree(folder / "step-100"), shutil.rmtree(folder / "step-200")
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        newest_valid(folder)


def test_a_link_or_a_file_is_no_checkpoint(folder) -> None:
    shutil.move(folder / "step-200", folder.parent / "step-200")
    (folder / "step-200").symlink_to(folder.parent / "step-200")
    (folder / "step-300").write_text("")
    found = newest_valid(folder, IDENTITY)
    assert found.step == 100 and ["no directory" in note for note in found.notes] == [True, True]


def test_nothing_there_is_no_error(tmp_path) -> None:
    assert newest_valid(tmp_path / "missing") is None
    (tmp_path / ".tmp-step-1-a").mkdir()
    assert newest_valid(tmp_path) is None


def test_find_takes_a_run_a_folder_or_a_checkpoint(folder) -> None:
    assert find(folder.parent).step == find(folder).step == 200
    assert find(folder / "step-100").step == 100
    copied = shutil.copytree(folder / "step-100", folder.parent / "my copy")
    assert find(Path(copied)).path == Path(copied)
    with pytest.raises(UserError, match="There is no folder"):
        find(folder / "missing")
    (folder.parent / "new").mkdir()
    with pytest.raises(UserError, match="There is no checkpoint in"):
        find(folder.parent / "new")


def test_a_reader_refuses_without_a_manifest(folder) -> None:
    (folder / "step-100" / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest.json"):
        CheckpointReader(folder / "step-100")


def test_unreadable_files_are_damage(folder, monkeypatch) -> None:
    """Permissions do not bind root, so the operating system's refusal is imitated."""

    def refuse(path: Path, count) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ds_stacking.checkpoint.verify.file_sha256", refuse)
    with pytest.raises(Unusable, match=r"cannot be read \(Permission denied\)"):
        verify(folder / "step-200")


def test_rank_zero_decides_for_all(folder) -> None:
    flip(folder / "step-200" / TENSORS, -1)
    found = run_threads(3, lambda exchange: find_together(folder, exchange, identity=IDENTITY))
    assert [f.step for f in found] == [100] * 3 and found[0] == found[1] == found[2]
    assert find_together(folder, OneRank(), identity=IDENTITY) == found[0]
    assert run_threads(2, lambda exchange: find_together(folder / "no", exchange)) == [None, None]


def test_an_error_of_rank_zero_is_raised_on_all(folder) -> None:
    def case(exchange) -> str:
        with pytest.raises(UserError) as error:
            find_together(folder, exchange, identity={"recipe": "ö"})
        return str(error.value)

    messages = run_threads(3, case)
    assert messages[0] == messages[1] == messages[2] and "recipe is 'tiny' there and 'ö' here" in messages[0]


def test_the_manifest_reads_back(folder) -> None:
    manifest = read_manifest(folder / "step-200")
    assert (manifest.step, manifest.sequence, manifest.keep, manifest.world_size) == (200, 2, False, 1)
    assert manifest.identity == IDENTITY and set(manifest.files) == {TENSORS, "rank-00000.json", "state.json", INDEX}
