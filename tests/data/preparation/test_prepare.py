"""Preparing data: once per cache, by any number of processes, killed or not."""

import dataclasses
import json
import os
import subprocess
import sys
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from transformers import AutoTokenizer

from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig, SourceConfig
from ds_stacking.data.manifests import SPLITS
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.documents import clean_text
from ds_stacking.data.preparation.folder import prepare_folder
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.prepared_data import PreparedData

FORK = """
import os, signal, sys
from ds_stacking.config import CorpusConfig
from ds_stacking.data.preparation import shards
from ds_stacking.data.preparation.prepare import prepare

source, cache = sys.argv[1:3]
config = CorpusConfig(cache_dir=cache, vocab_size=300, eval_percent=30, sequence_length=16, max_leak=100)

def child(log=lambda message: None):
    pid = os.fork()
    if pid == 0:
        data = prepare(source, "train", config, log=log)
        os.write(1, (data.fingerprint + "\\n").encode())
        os._exit(0)
    return pid

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
"""

TOGETHER = """
children = [child(lambda message: os.write(1, (message + "\\n").encode())) for _ in range(4)]
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
"""

KILLED = """
def killed(log=lambda message: None):
    assert os.WTERMSIG(os.waitpid(child(log), 0)[1]) == signal.SIGKILL
    assert not [name for name in os.listdir(cache) if not name.startswith(".") and not name.endswith(".lock")]

def kill_at(word):
    killed(lambda message: message.startswith(word) and die())

kill_at("Training")
kill_at("Tokenising")
add, shards.SplitWriter.add = shards.SplitWriter.add, die
killed()
shards.SplitWriter.add = add
kill_at("Prepared")
assert [name for name in os.listdir(cache) if name.startswith(".")]
assert os.waitpid(child(), 0)[1] == 0
"""


@pytest.fixture(scope="module")
def folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "broken.txt").write_bytes(b"\xff\xfe")
    return folder


def config(cache: Path, **fields: object) -> CorpusConfig:
    base = {"cache_dir": str(cache), "vocab_size": 300, "eval_percent": 30.0, "sequence_length": 16, "max_leak": 100.0}
    return CorpusConfig(**{**base, **fields})


def run(script: str, *arguments: Path) -> list[str]:
    command = [sys.executable, "-c", FORK + script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def prepared(folder: Path, cache: Path, messages: list[str]) -> PreparedData:
    return prepare(str(folder), "train", config(cache), log=messages.append)


def test_what_is_prepared(prepared: PreparedData, folder: Path, documents: list[str], messages: list[str]):
    assert prepared.vocab_size == 300
    assert dataclasses.asdict(prepared.special) == {
        "pad": 0,
        "cls": 2,
        "sep": 3,
        "mask": 4,
        "all_ids": (0, 1, 2, 3, 4),
    }
    assert AutoTokenizer.from_pretrained(prepared.tokenizer_dir).mask_token_id == 4
    manifest = prepared.manifest
    assert manifest["train"]["documents"] + manifest["eval"]["documents"] == len(documents)
    assert manifest["skipped"] == {str(folder / "broken.txt"): "not UTF-8 text"}
    assert any("broken.txt" in message for message in messages)
    assert (tokens := prepared.train.files[0].tokens).dtype == np.uint16 and not tokens.flags.writeable
    assert 3 < prepared.unigram_entropy < np.log(300)


def test_the_second_time_nothing_is_prepared(prepared: PreparedData, folder: Path, cache: Path):
    messages: list[str] = []
    again = prepare(str(folder), "train", config(cache, sequence_length=32), log=messages.append)
    assert messages == []
    assert again.folder == prepared.folder and again.fingerprint == prepared.fingerprint


def test_a_tokenizer_folder_gives_the_same_tokens(prepared: PreparedData, folder: Path, cache: Path):
    by_folder = prepare(str(folder), str(prepared.tokenizer_dir), config(cache), log=print)
    assert by_folder.folder != prepared.folder
    assert by_folder.fingerprint == prepared.fingerprint


def test_the_cache_sees_changed_settings_and_files(prepared: PreparedData, folder: Path, cache: Path, tmp_path: Path):
    fewer = prepare(str(folder), "train", config(cache, max_documents=30), log=print)
    cased = prepare(str(folder), "train", config(cache, lowercase=False), log=print)
    copy = tmp_path / "docs.jsonl"
    copy.write_bytes((folder / "docs.jsonl").read_bytes())
    copied = prepare(str(copy), "train", config(cache), log=print)
    assert len({prepared.folder, fewer.folder, cased.folder, copied.folder}) == 4
    assert copied.fingerprint == prepared.fingerprint != fewer.fingerprint


def test_the_environment_names_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_STACKING_CACHE", str(tmp_path / "deep" / "cache"))
    data = prepare(str(folder), "train", config(tmp_path, cache_dir=None), log=print)
    assert data.folder.parent == tmp_path / "deep" / "cache"


def test_folders_have_the_permissions_that_the_umask_leaves(folder: Path, tmp_path: Path):
    before = os.umask(0o027)
    try:
        data = prepare(str(folder), "train", config(tmp_path), log=print)
    finally:
        os.umask(before)
    assert data.folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in data.folder.iterdir() if path.is_file()} == {0o640}


def test_splits_shorter_than_a_block_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="eval split has 0 tokens.*raise corpus.eval_percent"):
        prepare(str(folder), "train", config(tmp_path, eval_percent=1e-9), log=print)
    with pytest.raises(UserError, match="train split has 0 tokens.*lower corpus.eval_percent"):
        prepare(str(folder), "train", config(tmp_path, eval_percent=100 - 1e-9), log=print)


def test_a_failed_preparation_leaves_nothing(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no text"):
        prepare(str(tmp_path / "empty.txt"), "train", config(tmp_path / "cache"), log=print)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_a_cache_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="DS_STACKING_CACHE"):
        prepare(str(folder), "train", config(tmp_path / "file"), log=print)


def test_processes_at_the_same_time_prepare_once(prepared: PreparedData, folder: Path, tmp_path: Path):
    lines = run(TOGETHER, folder, tmp_path)
    assert lines.count(prepared.fingerprint) == 4
    assert sum(line.startswith("Tokenising") for line in lines) == 1


def test_a_killed_preparation_is_never_taken_for_finished(prepared: PreparedData, folder: Path, tmp_path: Path):
    """Killed at the beginning, before and while tokenising, and before the rename; then the result is the usual."""
    assert run(KILLED, folder, tmp_path) == [prepared.fingerprint]
    (finished,) = [path for path in tmp_path.iterdir() if path.is_dir()]  # and the killed ones' remains are gone
    assert finished.name == prepared.folder.name
    for split in SPLITS:
        digest = sha256((finished / "shard-00000" / f"{split}.bin").read_bytes()).hexdigest()
        assert digest == json.loads((prepared.folder / "shard-00000" / "manifest.json").read_text())[split]["sha256"]


@pytest.mark.parametrize("options", [{}, {"sentences": True, "near_duplicates": 0.8}], ids=str)
def test_an_entry_of_the_cache_is_a_prepared_folder(documents: list[str], tmp_path: Path, options: dict):
    """Of one source each file of both is the same, byte for byte; and its tokens are those of the documents."""
    source = tmp_path / "docs.jsonl"
    texts = [*documents, documents[3].upper(), documents[5].replace(" the ", " this ", 1), " "]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    entry = prepare(str(source), "train", config(tmp_path / "cache", **options), log=print)
    reading = SourceConfig(eval_percent=30.0, vocab_size=300)
    fields = {"data": str(source), "output_dir": str(tmp_path / "out"), "max_leak": 100.0, "corpus": reading}
    prepare_folder(PreparationConfig(**fields, **options, workers=1), print)  # type: ignore[arg-type]
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (entry.folder, tmp_path / "out")
    ]
    assert files[0] == files[1] and {"card.md", "manifest.json", "shard-00000/train.bin"} < set(files[0])
    assert prepare(str(tmp_path / "out"), "train", config(tmp_path), log=print).fingerprint == entry.fingerprint

    near = [documents[5].replace(" the ", " this ", 1)] if not options else []
    known = AutoTokenizer.from_pretrained(entry.tokenizer_dir)
    expected: dict[bool, list[int]] = {True: [], False: []}
    for text in map(clean_text, [*documents, *near]):
        number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
        expected[number < 0.3 * 2**64] += [*known(text, add_special_tokens=False).input_ids, known.sep_token_id]
    for split, held_out in zip(SPLITS, (False, True), strict=True):
        assert np.frombuffer(files[0][f"shard-00000/{split}.bin"], np.uint16).tolist() == expected[held_out]


def test_what_was_there_before_is_left_out_and_sides_are_taken_by_the_cleaned_text(
    documents: list[str], prepared: PreparedData, tmp_path: Path
):
    """The same words in other signs and blanks: once; a text and its uncleaned twin lie on the same side."""
    texts = [*documents, documents[3].upper(), documents[5].replace(" ", "\t \u200b"), "\x00 \x7f"]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(str(tmp_path / "docs.jsonl"), str(prepared.tokenizer_dir), config(tmp_path), log=print)
    assert data.fingerprint == prepared.fingerprint and data.manifest["totals"]["equal"] == 2


def test_a_leak_is_refused_by_its_sentence(documents: list[str], tmp_path: Path):
    """Every document twice, once with another end: nearly all that is held out stands in the training split."""
    texts = [text + end for text in documents for end in ("", " And another end.")]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines: list[str] = []
    for _ in range(2):  # what was prepared is kept, and refused again without being made again
        with pytest.raises(
            UserError, match=r"^[0-9.]+ % of the held-out 13-grams stand in .* corpus.max_leak \(1 %\)"
        ):
            prepare(str(tmp_path / "docs.jsonl"), "train", config(tmp_path, max_leak=1.0), log=lines.append)
    assert len([line for line in lines if line.startswith("Training")]) == 1
    assert prepare(str(tmp_path / "docs.jsonl"), "train", config(tmp_path), log=print).manifest["leak"]["found"] > 0


def test_data_are_pinned_by_their_fingerprint(folder: Path, cache: Path, prepared: PreparedData, tmp_path: Path):
    """From the cache whatever became of the source; prepared anew they must be the same, or one sentence says so."""
    pinned = config(cache, fingerprint=prepared.fingerprint, eval_percent=20.0)
    lines: list[str] = []
    data = prepare(str(tmp_path / "gone.txt"), "gone", pinned, log=lines.append)
    # other tests of this cache may have made an entry of the same data from a source written otherwise
    assert (data.folder.parent, data.fingerprint) == (prepared.folder.parent, prepared.fingerprint)
    assert lines == [f"corpus.eval_percent is 30.0 in {data.folder}; the configuration's 20.0 has no effect."]

    elsewhere = config(tmp_path / "other", fingerprint=prepared.fingerprint)
    assert prepare(str(folder), "train", elsewhere, log=print).folder.is_relative_to(tmp_path)
    (tmp_path / "changed.txt").write_text("\n\n".join(f"Document {i} of other words." * 9 for i in range(99)))
    with pytest.raises(
        UserError, match=f"have the fingerprint .* not corpus.fingerprint .{prepared.fingerprint}"
    ) as e:
        prepare(str(tmp_path / "changed.txt"), "train", config(tmp_path, fingerprint=prepared.fingerprint), log=print)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"corpus.fingerprint is 'x'; it must be the 16 digits"):
        config(cache, fingerprint="x")


def test_a_pinned_entry_that_is_damaged_is_made_again(prepared: PreparedData, folder: Path, tmp_path: Path):
    pinned = config(tmp_path, fingerprint=prepared.fingerprint)
    first = prepare(str(folder), "train", pinned, log=print)
    os.truncate(first.folder / "shard-00000" / "train.bin", 9)
    (tmp_path / ("0" * 24)).mkdir()  # of nobody
    assert prepare(str(folder), "train", pinned, log=print).fingerprint == prepared.fingerprint
    assert len(prepare(str(folder), "train", pinned, log=print).train) == prepared.manifest["train"]["tokens"]


def test_a_fingerprint_is_of_the_token_ids_however_they_are_sharded(documents: list[str], tmp_path: Path) -> None:
    """That of an older folder, whose manifest has no digest of all token ids, stays the one of its shards' digests."""
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    fields: dict[str, Any] = {"data": str(tmp_path / "docs.jsonl"), "max_leak": 100.0, "workers": 1}
    fields["corpus"] = SourceConfig(eval_percent=30.0, vocab_size=300)
    for name, shard_tokens in (("one", 2**20), ("many", 5000)):
        asked = PreparationConfig(output_dir=str(tmp_path / name), shard_tokens=shard_tokens, **fields)
        prepare_folder(asked, lambda _: None, batch_characters=5000)
    opened = [prepare(str(tmp_path / name), "train", config(tmp_path), log=print) for name in ("one", "many")]
    assert len(opened[1].manifest["shards"]) > 1 and opened[0].fingerprint == opened[1].fingerprint
    manifest = json.loads((tmp_path / "one/manifest.json").read_text())
    digests = [sha256((tmp_path / f"one/shard-00000/{split}.bin").read_bytes()).hexdigest() for split in SPLITS]
    known = manifest["tokenizer_sha256"]
    assert opened[0].fingerprint == sha256((known + "".join(digests)).encode()).hexdigest()[:16]
    for split in SPLITS:
        del manifest[split]["tokens_sha256"]
    (tmp_path / "one/manifest.json").write_text(json.dumps(manifest))
    old = sha256((known + "".join(sha256(digest.encode()).hexdigest() for digest in digests)).encode())
    assert prepare(str(tmp_path / "one"), "train", config(tmp_path), log=print).fingerprint == old.hexdigest()[:16]


def test_what_another_process_makes_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """The lock of the entry is free, as after somebody has tidied up, that of the folder in the making is not."""
    cache = tmp_path / "cache"
    entry = prepare(str(folder), "train", config(cache), log=print).folder
    making = entry.rename(entry.with_name(f".{entry.name}"))
    (making / "manifest.json").unlink()
    with FileLock(making / ".lock"), pytest.raises(UserError, match="Another process prepares"):
        prepare(str(folder), "train", config(cache), log=print)
    assert (making / "shard-00000/manifest.json").is_file()
    lines: list[str] = []
    assert prepare(str(folder), "train", config(cache), log=lines.append).folder == entry
