"""grow_checkpoint.py and bad input, a full disk, a kill: one sentence, nothing left, the same command mended works."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_stacking.checkpoint import offline
from ds_stacking.checkpoint.grow import grow_folder
from ds_stacking.checkpoint.huggingface import HuggingFaceWriter
from ds_stacking.common.errors import RunFailed, UserError
from launchers import grow_checkpoint
from tests.checkpoint.stores import save
from tests.studies.glue.glue_files import write_encoder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_encoder(folder / "model", layers=2)
    save(folder / "run" / "checkpoints", 100)
    return folder


@pytest.fixture
def here(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> None:
    """The launcher's body with these arguments."""
    sys.argv = ["grow_checkpoint.py", *arguments]
    grow_checkpoint.main()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        f"{path.relative_to(folder)}/": b"" for path in folder.rglob("*") if path.is_dir()
    }


def make(name: str, kind: str) -> None:
    path = Path(name)
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        path.mkdir()
    elif kind == "full":
        path.mkdir(), (path / "x").write_text("x")
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("source", ["model", "run", "run/checkpoints", "run/checkpoints/step-100"])
@pytest.mark.parametrize(
    ("target", "layers", "options", "made", "words"),
    [
        ("", "4", [], "", "OUT is empty; give the folder"),
        ("out", "4", [], "file", "out exists; name a folder that does not"),
        ("out", "4", [], "full", "out exists; name a folder that does not"),
        ("out", "4", [], "nowhere", "out exists; name a folder that does not"),
        ("out", "4", [], "model", "out exists; name a folder that does not"),
        ("SOURCE", "4", [], "", "exists; name a folder"),
        ("SOURCE/inner/out", "4", [], "", "lies inside .*, which stays as it is"),
        ("out/../SOURCE/inner", "4", [], "", "lies inside .*|cannot be made"),
        ("out/inner", "4", [], "file", "out/inner cannot be made: .*/out is no folder"),
        ("/proc/nothing/out", "4", [], "", "/proc/nothing/out cannot be made"),
        ("x" * 300, "4", [], "", "could not be written|cannot be made"),
        ("out", "0", [], "", "--to_layers is .*; it must be a whole number from 1 to"),
        ("out", "-1", [], "", "--to_layers is .*; it must be a whole number from 1 to"),
        ("out", "1", [], "", "would shrink the model"),
        ("out", "1000000000", [], "", "--to_layers is .*; it must be a whole number from 1 to"),
        ("out", str(10**30), [], "", "--to_layers is .*; it must be a whole number from 1 to"),
        ("out", "nan", [], "", "--to_layers is .*; it must be a whole number from 1 to"),
        ("out", "9" * 5000, [], "", "--to_layers is .*; it must be a whole number from 1 to"),
        ("out", "4", ["--operator="], "", "operator is empty"),
        ("out", "4", ["--operator=0,1,99,0"], "", "names block 99, but the model has blocks 0 to 1"),
        ("out", "4", ["--operator=0,1,0"], "", "lists 3 blocks, but the grown model has 4"),
        ("out", "4", ["--operator=" + ",".join("01" * 50_000)], "", "operator is '0,1,0.*[.]{3}; it must name"),
        ("out", "4", ["--operator=0,1,0," + "9" * 5000], "", "operator is '0,1,0,999.*[.]{3}; it must name"),
        ("out", "4", ["--operator=fresh"], "", "only a model can initialise"),
        ("out", "4", ["--to-layers=4"], "", "^to-layers is now called to_layers[.]$"),
        ("out", None, ["--to-layers=4"], "", "^to-layers is now called to_layers[.]$"),
        ("out", "4", ["--operators=stack"], "", "Unknown option .--operators.; did you mean --operator"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    here: Path, source: str, target: str, layers: str | None, options: list[str], made: str, words: str
) -> None:
    if made:
        make("out", made)
    before = everything(here)
    with pytest.raises(UserError) as error:
        depth = [] if layers is None else [f"--to_layers={layers}"]
        call(source, target.replace("SOURCE", source), *depth, *options)
    said = str(error.value)
    assert re.search(words, said) and "\n" not in said and len(said) < 700, said
    assert everything(here) == before


@pytest.mark.parametrize(
    ("source", "made", "words"),
    [
        ("", "", "IN is empty"),
        ("nowhere", "", "There is no folder nowhere, it is not there"),
        ("in", "file", "There is no folder in, it is a file"),
        ("in/inner", "file", "There is no folder in/inner"),
        ("in", "folder", "There is no checkpoint in in"),
        ("in", "full", "There is no checkpoint in in"),
    ],
)
def test_a_source_that_is_none(here: Path, source: str, made: str, words: str) -> None:
    if made:
        make("in", made)
    with pytest.raises(UserError, match=words):
        call(source, "out", "--to_layers=4")
    assert not (here / "out").exists()


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_run_without_checkpoints(here: Path, with_folder: bool) -> None:
    (here / "new").mkdir()
    (here / "new" / "config.json").write_text("{}")
    (here / "new" / "metrics.jsonl").write_text("")
    if with_folder:
        (here / "new" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="There is no checkpoint in new"):
        call("new", "out", "--to_layers=4")


def fails_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when all tensors are written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HuggingFaceWriter, "finish", full)
    monkeypatch.setattr(offline, "publish", full)


@pytest.mark.parametrize("source", ["model", "run"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    here: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(here)
    with monkeypatch.context() as patch:
        fails_late(patch)
        with pytest.raises(RunFailed, match="new/out: No space left on device; free space on its disk and run"):
            call(source, "new/out", "--to_layers=4")
    assert everything(here) == before
    call(source, "new/out", "--to_layers=4")


def in_child(body: Callable[[], None]) -> int:
    """The exit code of a fork: 0 where `body` returned, 7 where it raised RunFailed, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        except RunFailed:
            code = 7
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("source", ["model", "run"])
def test_a_limit_on_files_is_a_full_disk(here: Path, source: str) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        grow_folder(Path(source), Path("out"), operator="stack", layers=4)

    before = everything(here)
    assert in_child(limited) == 7
    assert everything(here) == before


@pytest.mark.parametrize("source", ["model", "run"])
def test_what_a_kill_leaves_goes_with_the_next_start(here: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> None:
        monkeypatch.setattr(HuggingFaceWriter, "finish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        monkeypatch.setattr(offline, "publish", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        grow_folder(Path(source), Path("out"), operator="stack", layers=4)

    assert in_child(killed) == -signal.SIGKILL
    assert not (here / "out").exists()
    (left,) = {path.name for path in here.iterdir()} - {"model", "run"}
    assert left.startswith(".out.")
    call(source, "out", "--to_layers=4")
    assert {path.name for path in here.iterdir()} == {"model", "run", "out"}


def test_an_empty_folder_may_stand_there(here: Path) -> None:
    (here / "out").mkdir()
    call("run", "out", "--to_layers=4")
    assert [path.name for path in (here / "out").iterdir()] == ["step-100"]
    assert (here / "out").stat().st_mode & 0o077 == 0


def test_what_is_taken_over_is_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model" / "modeling_evil.py").write_text("")
    call("model", "out", "--to_layers=4")
    said = capsys.readouterr().out
    assert "taken over as they are: tokenizer.json, tokenizer_config.json" in said
    assert "not taken over: 'modeling_evil.py'" in said and not (here / "out" / "modeling_evil.py").exists()
