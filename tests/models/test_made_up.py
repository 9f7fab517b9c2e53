"""Hugging Face folders that are damaged or made up: one sentence from every reader; the hub's own links work."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModel

from ds_stacking.checkpoint.grow import grow_folder
from ds_stacking.common.errors import UserError
from ds_stacking.common.model_folder import check_links, model_file, one_sentence
from ds_stacking.models.convert import from_huggingface
from ds_stacking.models.encoders import load_model, quiet
from tests.models.made_up import FAULTS, GROWTH_FAULTS, LOADING_FAULTS, configured
from tests.studies.glue.glue_files import write_encoder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    return write_encoder(tmp_path_factory.mktemp("pristine") / "model", layers=2)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    return tmp_path / "model"


def grow(folder: Path) -> None:
    try:
        grow_folder(folder, folder.parent / "grown", operator="stack", layers=4)
    finally:
        left = {path.name for path in folder.parent.iterdir()} - {"model", "elsewhere"}
        assert left == ({"grown"} if (folder.parent / "grown" / "model.safetensors").is_file() else set())


def load(folder: Path) -> None:
    load_model(AutoModel, folder)


def convert(folder: Path) -> None:
    from_huggingface(folder)


def refused(read: Callable[[Path], None], folder: Path, words: str) -> None:
    with pytest.raises(UserError) as error:
        read(folder)
    text = str(error.value)
    assert re.search(words, text) and "\n" not in text and len(text) < 700 and str(folder) in text, text
    assert not (folder.parent / "exploded").exists()


@pytest.mark.parametrize("read", [grow, load, convert])
def test_a_good_folder_is_read(folder: Path, read: Callable[[Path], None]) -> None:
    read(folder)


@pytest.mark.parametrize("read", [grow, load, convert])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_reader_names_the_fault(folder: Path, fault: str, read: Callable[[Path], None]) -> None:
    mutate, words = FAULTS[fault]
    mutate(folder)
    refused(read, folder, words)


@pytest.mark.parametrize("fault", GROWTH_FAULTS)
def test_growth_names_the_fault(folder: Path, fault: str) -> None:
    mutate, words = GROWTH_FAULTS[fault]
    mutate(folder)
    refused(grow, folder, words)


@pytest.mark.parametrize("read", [load, convert])
@pytest.mark.parametrize("fault", LOADING_FAULTS)
def test_loading_names_the_fault(folder: Path, fault: str, read: Callable[[Path], None]) -> None:
    mutate, words = LOADING_FAULTS[fault]
    mutate(folder)
    refused(read, folder, words)


def hub_cache(folder: Path, cache: Path) -> Path:
    """The layout of a hub cache: a snapshot of links to blobs."""
    model = cache / "hub" / "models--somebody--tiny"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True), (model / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, model / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


@pytest.mark.parametrize("read", [load, convert])
def test_a_snapshot_in_a_hub_cache_is_read(folder: Path, tmp_path: Path, read: Callable[[Path], None]) -> None:
    read(hub_cache(folder, tmp_path))


def test_a_snapshot_is_grown_into_files(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path / "cache")
    grow_folder(snapshot, tmp_path / "grown", operator="stack", layers=4)
    names = {path.name for path in (tmp_path / "grown").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert not any(path.is_symlink() for path in (tmp_path / "grown").iterdir())


@pytest.mark.parametrize(
    "target", ["../../../../secret", "../../../models--other/blobs/x", "/etc/hostname", "../away/x"]
)
def test_links_that_leave_the_snapshots_model_are_refused(folder: Path, tmp_path: Path, target: str) -> None:
    snapshot = hub_cache(folder, tmp_path / "cache")
    for path in (tmp_path / "cache/secret", tmp_path / "cache/hub/models--other/blobs/x", tmp_path / "outside/x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (snapshot.parent / "a").symlink_to(tmp_path / "outside")
    (snapshot / "vocab.txt").symlink_to(target)
    for read in (check_links, convert, lambda s: grow_folder(s, tmp_path / "grown", operator="stack", layers=4)):
        with pytest.raises(UserError, match=r"vocab.txt is a link to "):
            read(snapshot)
    assert not (tmp_path / "grown").exists()


def test_only_known_files_are_taken_over(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("what the shallow model lost")
    (folder / "id_rsa").write_text("secret")
    (folder / "more").mkdir()
    configured(tie_word_embeddings=True)(folder)
    grow_folder(folder, tmp_path / "grown", operator="stack", layers=4)
    names = {path.name for path in (tmp_path / "grown").iterdir()}
    assert names == {"LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_name_must_be_one_of_the_folder(folder: Path) -> None:
    assert model_file(folder, "config.json") == folder / "config.json"
    for name in ("", ".", "..", "a/b", "/etc/hostname", "x\0y"):
        with pytest.raises(UserError, match="leads out of it"):
            model_file(folder, name)
    with pytest.raises(FileNotFoundError):
        model_file(folder, "none")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match="is no regular file"):
        model_file(folder, "pipe")


class Panic(BaseException):
    """As Rust libraries raise it."""


@pytest.mark.parametrize("error", [Panic("called `unwrap()` on\n a value"), RecursionError("deep"), MemoryError()])
def test_a_panic_is_one_sentence(error: BaseException) -> None:
    with (
        pytest.raises(UserError, match=r"^It cannot be read \(.+\); restore that folder") as caught,
        one_sentence("It cannot be read"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    for passing in (KeyboardInterrupt, SystemExit):
        with pytest.raises(passing), one_sentence("It cannot be read"):
            raise passing
