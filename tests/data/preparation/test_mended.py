"""Preparing that was refused or broke off: nothing is left that is in the way, and the command, mended, works."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.config import CorpusConfig, RunConfig, SourceConfig
from ds_stacking.data.preparation import build, worker
from ds_stacking.data.preparation import folder as module
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.sources.corpus import RawDocument
from ds_stacking.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[3]
prepare_folder = partial(module.prepare_folder, batch_characters=5000)


@pytest.fixture(scope="module")
def tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, 600, True).save_pretrained(str(folder))
    return folder


@pytest.fixture
def source(documents: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "source" / "docs.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def options(source: Path | str, folder: Path, tokenizer: Path | str, **fields: object) -> PreparationConfig:
    corpus = SourceConfig(eval_percent=30.0, **dict(fields.pop("corpus", {})))  # type: ignore[call-overload]
    base = {"max_leak": 100.0, "shard_tokens": 8000, "workers": 1, "corpus": corpus}
    return PreparationConfig(
        data=str(source),
        output_dir=str(folder),
        tokenizer=str(tokenizer),
        **{**base, **fields},  # type: ignore[arg-type]
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("shard-*/*"))}


REFUSED: dict[str, tuple[Callable[[Path], object], dict, str]] = {
    "an empty source": (lambda s: s.write_text("\n"), {}, "holds no text"),
    "nothing but invisible text": (
        lambda s: s.write_text(json.dumps({"text": "\u200b\ufeff"}) + "\n"),
        {},
        "Nothing is left of the 1 documents",
    ),
    "a wrong column": (lambda s: None, {"corpus": {"column": "body"}}, "no column 'body'"),
    "a long line": (lambda s: None, {"corpus": {"max_document": 100}}, "line 1: more than 100 characters"),
    "a binary file": (lambda s: s.write_bytes(b"\xff\0"), {}, "no readable text"),
    "no source": (lambda s: s.unlink(), {}, "does not exist"),
    "no tokenizer": (lambda s: None, {"tokenizer": "/nowhere/at/all"}, "tokenizer folder"),
    "an unreadable tokenizer": (lambda s: None, {"tokenizer": str(ROOT / "tests")}, "cannot be loaded|holds no tok"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_refused_is_not_remembered(source: Path, tokenizer: Path, tmp_path: Path, name: str):
    spoil, fields, words = REFUSED[name]
    content, folder = source.read_bytes(), tmp_path / "new" / "deep" / "folder"
    spoil(source)
    with pytest.raises(UserError, match=words):
        prepare_folder(options(source, folder, **{"tokenizer": tokenizer, **fields}), print)
    assert not (tmp_path / "new").exists(), "nothing is left behind"
    source.write_bytes(content)
    prepare_folder(options(source, folder, tokenizer), print)
    assert (folder / "manifest.json").is_file()


def test_a_folder_that_was_there_stays(source: Path, tokenizer: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="no column"):
        prepare_folder(options(source, tmp_path / "out", tokenizer, corpus={"column": "body"}), print)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_others_is_left_as_it_was(source: Path, tokenizer: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare_folder(options(source, tmp_path / "out", tokenizer), print)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_folder_without_a_shard_binds_nobody(source: Path, tokenizer: Path, tmp_path: Path):
    """What a killed command left, with other options."""
    folder = tmp_path / "out"
    begun = {"format": 1, "source": {}, "tokenizer": "0", "eval_percent": 1, "sentences": True}
    begun |= {"near_duplicates": 0, "shard_tokens": 9}
    shutil.copytree(tokenizer, folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "preparation.json").write_text(json.dumps(begun))
    prepare_folder(options(source, folder, tokenizer), print)
    assert (folder / "manifest.json").is_file()


def test_a_missing_shard_is_made_again_and_so_are_those_behind_it(source: Path, tokenizer: Path, tmp_path: Path):
    folder = tmp_path / "out"
    prepare_folder(options(source, folder, tokenizer), print)
    before, count = shards(folder), len(list(folder.glob("shard-*")))
    assert count >= 3
    for number in (1, count - 1, 0):
        shutil.rmtree(folder / f"shard-{number:05d}")
        lines: list[str] = []
        prepare_folder(options(source, folder, tokenizer), lines.append)
        assert not any("is finished" in line for line in lines)
        assert shards(folder) == before


def test_an_output_folder_in_the_source_is_refused(source: Path, tokenizer: Path):
    with pytest.raises(UserError, match="lies in the data source .* choose a folder elsewhere"):
        prepare_folder(options(source.parent, source.parent / "prepared", tokenizer), print)
    assert not (source.parent / "prepared").exists()


@pytest.mark.parametrize("where", ["{source}", "{source}/below", "/proc/self/nothing/here", "a" * 300])
def test_an_output_folder_that_cannot_be_is_refused(source: Path, tokenizer: Path, tmp_path: Path, where: str):
    folder = tmp_path / where.format(source=source)
    with pytest.raises(UserError, match="cannot be written .*choose another --output_dir"):
        prepare_folder(options(source, folder, tokenizer), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("failing", [1, 3, 8, 40])
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
):
    """The disk takes no more at some file's end: of preparation.json, of the first shard, of a later one."""
    folder, sync, calls = tmp_path / "out", os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left on device.*making room.*the same command") as error:
            prepare_folder(options(source, folder, tokenizer), print)
    assert "\n" not in str(error.value)
    assert not [path for path in folder.iterdir() if path.name.startswith(".shard-") or path.name.endswith(".tmp")]
    assert not (folder / "manifest.json").exists()
    prepare_folder(options(source, folder, tokenizer), print)
    prepare_folder(options(source, tmp_path / "whole", tokenizer), print)
    assert shards(folder) == shards(tmp_path / "whole")


def test_a_full_disk_below_the_cache_is_one_sentence(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = CorpusConfig(cache_dir=str(tmp_path / "cache"), sequence_length=32, eval_percent=30, max_leak=100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left on device; make room, or set corpus.cache_dir"):
            prepare(str(source), str(tokenizer), config, log=print)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
    assert prepare(str(source), str(tokenizer), config, log=print).folder.is_dir()


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space"), Exception("No space left on device (os error 28)")]
)
def test_a_tokenizer_that_cannot_be_saved_is_one_sentence(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Exception
):
    def fail(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
        with pytest.raises(RunFailed, match="No space.*the same command"):
            prepare_folder(options(source, tmp_path / "out", tokenizer), print)
    prepare_folder(options(source, tmp_path / "out", tokenizer), print)


def test_ctrl_c_is_one_sentence_and_workers_end(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[None] = []
    add = build.ShardWriter.add

    def interrupted(*arguments: object) -> None:
        calls.append(None)
        if len(calls) == 12:
            raise KeyboardInterrupt
        add(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build.ShardWriter, "add", interrupted)
        with pytest.raises(RunFailed, match="Ctrl-C; give the same command to go on"):
            prepare_folder(options(source, tmp_path / "out", tokenizer), print)
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    lines: list[str] = []
    prepare_folder(options(source, tmp_path / "out", tokenizer), lines.append)
    assert "finished shards are kept" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["Training a tokenizer", "is kept"])
def test_ctrl_c_in_a_terminal_leaves_no_word_of_workers(documents: list[str], tmp_path: Path, after: str):
    """The whole process group gets SIGINT, as from a terminal."""
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text + str(n)}) + "\n" for n in range(400) for text in documents))
    command = [sys.executable, str(ROOT / "launchers" / "prepare_data.py"), "--workers=2", "--shard_tokens=100000"]
    command += [
        "--data",
        str(path),
        "--output_dir",
        str(tmp_path / "out"),
        "--corpus.vocab_size=300",
        "--max_leak=100",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline().startswith("Training a tokenizer")
    while after == "is kept" and not (tmp_path / "out" / "shard-00000").exists():
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, words = process.communicate(timeout=120)
    assert process.returncode in (1, 130) and "Ctrl-C" in words
    assert "SpawnProcess" not in words and "spawn_main" not in words, words
    assert not psutil.wait_procs(workers, timeout=20)[1]


class PanicException(BaseException):
    """What a panic of Rust is in Python."""


@pytest.mark.parametrize("error", [MemoryError(), PanicException("index out of bounds"), ValueError("two\nlines")])
@pytest.mark.parametrize("function", [worker.clean, worker.tokenise])
def test_a_worker_that_fails_says_so_in_a_sentence(error: BaseException, function: Callable):
    class Failing(RawDocument):
        def plain(self) -> str:
            raise error

    with pytest.raises(
        RunFailed, match=f"A worker failed with {type(error).__name__} .* begins 'some text'"
    ) as caught:
        function([Failing("some text")])
    assert "\n" not in str(caught.value)


def test_ctrl_c_while_a_small_corpus_is_prepared_is_no_fault_of_a_document():
    """Without workers, which ignore it, the signal arrives in the midst of it."""

    class Interrupted(RawDocument):
        def plain(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.tokenise([Interrupted("some text")])


@pytest.mark.parametrize("name", ["data", "tokenizer"])
@pytest.mark.parametrize("value", ["", "  ", "a\0b"])
def test_names_that_are_none_are_refused(name: str, value: str):
    fields = {"data": "docs", "output_dir": "out", "corpus": SourceConfig(), name: value}
    with pytest.raises(UserError, match=f"{name} (is|holds) "):
        PreparationConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{name} (is|holds) "):
        RunConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"workers": 10**6}, {"output_dir": ""}, {"data": ""}, {"output_dir": " "}], ids=str
)
def test_settings_of_preparing_are_bounded(fields: dict):
    with pytest.raises(UserError, match=f"{next(iter(fields))} is "):
        PreparationConfig(**{"data": "docs", "output_dir": "out", **fields})


def test_names_that_are_no_text_are_prepared(documents: list[str], tokenizer: Path, tmp_path: Path):
    folder = tmp_path / "source"
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xe9.txt")).write_bytes(b"\xff")
    manifest = prepare_folder(options(folder, tmp_path / "out", tokenizer), print)
    assert list(manifest["skipped"]) == [f"{folder}/bad\\udce9.txt"]
    assert "caf\\udce9" in (tmp_path / "out" / "card.md").read_text()
    config = CorpusConfig(cache_dir=str(tmp_path / "cache"), sequence_length=32, eval_percent=30, max_leak=100)
    assert prepare(str(folder), str(tokenizer), config, log=print).fingerprint
    assert prepare(str(tmp_path / "out"), "train", config, log=print).fingerprint


def test_only_the_names_of_shards_are_shards(source: Path, tokenizer: Path, tmp_path: Path):
    folder = tmp_path / "out"
    prepare_folder(options(source, folder, tokenizer), print)
    others = ("shard-old", "shard-archive", "shard-00001.bak", "shard-99999x", ".shard-mine")
    for name in others:
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("mine")
    before = shards(folder)
    lines: list[str] = []
    prepare_folder(options(source, folder, tokenizer), lines.append)
    assert "is finished" in lines[-1] and len(lines) == 1
    shutil.rmtree(folder / "shard-00001")
    prepare_folder(options(source, folder, tokenizer), print)
    assert shards(folder) == before, "what is made again is the same, and the others are there"
    assert all((folder / name / "mine.txt").read_text() == "mine" for name in others)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', '{"steps": ["a"]}', '{"a":' * 10**5])
def test_a_foreign_preparation_json_is_left_as_it_was(source: Path, tokenizer: Path, tmp_path: Path, content: str):
    folder = tmp_path / "out"
    (folder / "tokenizer").mkdir(parents=True)
    files = {"preparation.json": content, "manifest.json": "{}", "card.md": "mine", "tokenizer/mine.txt": "mine"}
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match="holds other files: its preparation.json is not one of prepare_data.py"):
        prepare_folder(options(source, folder, tokenizer), print)
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()} == files
