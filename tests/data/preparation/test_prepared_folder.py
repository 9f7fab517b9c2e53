"""Prepared folders: the same shards from any format and number of workers, killed or not; damage found."""

from __future__ import annotations

import bz2
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig, SourceConfig
from ds_stacking.data.preparation import build
from ds_stacking.data.preparation import folder as module
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.documents import clean_text, is_held_out, split_sentences
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.prepared_folder import find_fault, open_folder
from ds_stacking.data.sources.mediawiki import clean_wikitext
from ds_stacking.data.tokenizer import train_tokenizer

EVAL_PERCENT = 30.0
prepare_folder = partial(module.prepare_folder, batch_characters=5000)
KILLED = """
import os, signal, sys
from ds_stacking.config import SourceConfig
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation import build
from ds_stacking.data.preparation.folder import prepare_folder

if __name__ == "__main__":
    data, output_dir, tokenizer = sys.argv[1:4]
    add, calls = build.ShardWriter.add, []

    def die(self, *arguments):
        calls.append(None)
        if len(calls) == 12:
            children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read()
            print(children, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *arguments)

    build.ShardWriter.add = die
    source = SourceConfig(eval_percent=30.0)
    fields = {"sentences": True, "near_duplicates": 0.8, "max_leak": 100, "shard_tokens": 8000, "workers": 1}
    fields |= {"data": data, "output_dir": output_dir, "tokenizer": tokenizer, "corpus": source}
    prepare_folder(PreparationConfig(**fields), print, batch_characters=5000)
"""
KILLED_AT_A_RENAME = KILLED.replace(
    """    build.ShardWriter.add = die
""",
    """    renames, replace = int(sys.argv[4]), os.replace

    def die_or_replace(*names):
        calls.append(None)
        os.kill(os.getpid(), signal.SIGKILL) if len(calls) == renames else replace(*names)

    os.replace = die_or_replace
""",
)
KILLED_IN_EVERY_FILE = """
import os, signal, sys
from ds_stacking.config import SourceConfig
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation import build
from ds_stacking.data.preparation.folder import prepare_folder

def prepare(last):
    written, fsync = [], os.fsync

    def counted(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(name) and not name.endswith((".bin", ".npy")):
            written.append(name)
            if len(written) == last:
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = counted
    prepare_folder(PreparationConfig(**fields), print, batch_characters=5000)
    os._exit(0)

if __name__ == "__main__":
    fields = {"sentences": True, "near_duplicates": 0.8, "max_leak": 100, "shard_tokens": 8000, "workers": 1}
    fields |= {"corpus": SourceConfig(eval_percent=30.0)}
    fields |= dict(zip(("data", "output_dir", "tokenizer"), sys.argv[1:]))
    cut = 0
    while (status := os.waitpid(os.fork() or prepare(cut + 1), 0)[1]) == signal.SIGKILL:
        cut += 1
    print(cut, os.waitstatus_to_exitcode(status))
"""


@pytest.fixture(scope="module")
def texts(documents: list[str]) -> list[str]:
    """Documents, an empty one, one that differs in case alone, and one that differs in a few words."""
    near = documents[5].replace(" the ", " this ", 1)
    return [*documents[:20], " \n", documents[3].upper(), near, *documents[20:]]


@pytest.fixture(scope="module")
def tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, 600, True).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def options(data: Path, output_dir: Path, tokenizer: str, **fields: object) -> PreparationConfig:
    base = {"sentences": True, "near_duplicates": 0.8, "max_leak": 100.0, "shard_tokens": 8000, "workers": 1}
    corpus = SourceConfig(eval_percent=EVAL_PERCENT, column=str(fields.pop("column", "text")))
    return PreparationConfig(
        data=str(data), output_dir=str(output_dir), tokenizer=tokenizer, corpus=corpus, **{**base, **fields}
    )


@pytest.fixture(scope="module")
def folder(source: Path, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "docs"
    prepare_folder(options(source, folder, tokenizer), print)
    return folder


def arrays(folder: Path) -> dict[str, bytes]:
    """Every file of the shards."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("shard-*/*"))}


def test_documents_come_back_cleaned_and_once(folder: Path, documents: list[str], tokenizer: str):
    manifest, splits = open_folder(folder)
    assert len(manifest["shards"]) >= 3
    assert manifest["totals"]["equal"] == manifest["totals"]["near"] == 1
    assert manifest["read"] == len(documents) + 2
    known = AutoTokenizer.from_pretrained(tokenizer)
    for split, whole in splits.items():
        expected = [
            [*known(text, add_special_tokens=False).input_ids, known.sep_token_id]
            for text in map(clean_text, documents)
            if is_held_out(text, EVAL_PERCENT) == (split == "eval")
        ]
        found = [
            file.tokens[a:b].tolist()
            for file in whole.files
            for a, b in zip(file.offsets[:-1], file.offsets[1:], strict=True)
        ]
        assert found == expected
        assert manifest[split]["documents"] == len(expected)
        assert manifest[split]["tokens"] == len(whole) == sum(map(len, expected))


def test_sentences_begin_where_the_text_says(folder: Path, documents: list[str], tokenizer: str):
    known = AutoTokenizer.from_pretrained(tokenizer)
    file = open_folder(folder)[1]["train"].files[0]
    assert file.sentences is not None
    texts = [text for text in map(clean_text, documents) if not is_held_out(text, EVAL_PERCENT)]
    expected: list[int] = []
    place = 0
    for text in texts[: len(file.offsets) - 1]:
        for piece in split_sentences(text):
            if size := len(known(piece, add_special_tokens=False).input_ids):
                expected.append(place)
                place += size
        place += 1
    assert file.sentences.tolist() == expected and place == len(file)


def test_the_card_shows_what_was_counted(folder: Path):
    manifest, card = open_folder(folder)[0], (folder / "card.md").read_text()
    assert f"| words | {manifest['totals']['words']:,} |" in card
    assert "| left out: nearly equal to an earlier one | 1 (similarity 0.8 or more) |" in card
    assert "](lengths.png)" in card and (folder / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_any_number_of_workers_and_a_kill_give_the_same_shards(
    folder: Path, source: Path, tokenizer: str, tmp_path: Path
):
    two = tmp_path / "two"
    prepare_folder(options(source, two, tokenizer, workers=2), print)
    assert arrays(two) == arrays(folder)

    killed = tmp_path / "killed"
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), str(source), str(killed), tokenizer]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    workers = [
        psutil.Process(int(pid)) for pid in result.stdout.split("\n")[-2].split() if psutil.pid_exists(int(pid))
    ]
    assert not psutil.wait_procs(workers, timeout=20)[1], "workers end with their parent"
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob("shard-*")}
    assert 1 <= len(finished) < len(list(folder.glob("shard-*")))
    with pytest.raises(UserError, match="not finished"):
        open_folder(killed)
    lines: list[str] = []
    prepare_folder(options(source, killed, tokenizer), lines.append)
    assert any(f"{len(finished)} finished shards are kept" in line for line in lines)
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == finished
    assert arrays(killed) == arrays(folder)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_any_file_leaves_a_folder_that_goes_on(
    folder: Path, source: Path, tokenizer: str, tmp_path: Path
):
    """JSON files, card and figure are whole or absent: no start finds half of one, whichever was cut short."""
    (tmp_path / "script.py").write_text(KILLED_IN_EVERY_FILE)
    command = [sys.executable, str(tmp_path / "script.py"), str(source), str(tmp_path / "cut"), tokenizer]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    cut, code = result.stdout.split("\n")[-2].split()
    assert code == "0", result.stderr
    assert int(cut) >= 5, "the beginning, a shard, the figure, the card and the manifest"
    assert arrays(tmp_path / "cut") == arrays(folder)


@pytest.mark.parametrize("name", ["train.bin", "eval_offsets.npy", "digests.npy", "manifest.json"])
def test_a_flipped_byte_is_found(folder: Path, tmp_path: Path, name: str):
    shard = shutil.copytree(folder / "shard-00000", tmp_path / "shard-00000")
    assert find_fault(tmp_path, 0, 600) is None
    data = bytearray((shard / name).read_bytes())
    data[len(data) // 2 if name != "manifest.json" else 0] ^= 1
    (shard / name).write_bytes(data)
    assert f"shard-00000/{name} is damaged" in str(find_fault(tmp_path, 0, 600))


def test_a_damaged_shard_is_made_again(folder: Path, source: Path, tokenizer: str, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "shard-00001" / "digests.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    lines: list[str] = []
    prepare_folder(options(source, copy, tokenizer), lines.append)
    assert "shard-00001/digests.npy is damaged" in lines[0]
    assert arrays(copy) == arrays(folder)
    prepare_folder(options(source, copy, tokenizer), lines.append)
    assert "finished" in lines[-1]


def test_every_format_gives_the_same_tokens(texts: list[str], tokenizer: str, tmp_path: Path):
    """Of paragraphs without empty lines and markup, which plain text and wikitext cannot hold."""
    plain = [text for text in map(clean_wikitext, texts) if clean_wikitext(text) == text != ""]
    assert len(plain) > 30
    pages = "".join(f"<page><ns>0</ns><revision><text>{escape(text)}</text></revision></page>" for text in plain)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in plain)
    (tmp_path / "a.txt").write_text("\n\n".join(plain))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "a.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict({"body": plain}), tmp_path / "a.parquet")
    found = {}
    for name in ("a.txt", "a.jsonl.bz2", "a.xml.bz2", "a.parquet"):
        output = tmp_path / name.replace(".", "_")
        prepare_folder(options(tmp_path / name, output, tokenizer, column="body", near_duplicates=0.0), print)
        found[name] = open_folder(output)[0]["train"]["sha256"]
    assert len(set(found.values())) == 1, found


def test_what_pretraining_opens(folder: Path, tokenizer: str, tmp_path: Path):
    lines: list[str] = []
    config = CorpusConfig(cache_dir=str(tmp_path / "never made"), sequence_length=32, eval_percent=5)
    data = prepare(str(folder), "train", config, log=lines.append)
    assert data.vocab_size == 600 and len(data.train) == open_folder(folder)[0]["train"]["tokens"]
    decided = {"eval_percent": (30.0, 5), "sentences": (True, False), "near_duplicates": (0.8, 0.0)}
    assert lines == [
        f"corpus.{name} is {there} in {folder}; the configuration's {here} has no effect."
        for name, (there, here) in decided.items()
    ]
    assert prepare(str(folder), tokenizer, config, log=print).fingerprint == data.fingerprint
    assert not (tmp_path / "never made").exists()
    other = train_tokenizer(["another vocabulary altogether"] * 9, 100, True)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="was tokenised with"):
        prepare(str(folder), str(tmp_path / "other"), config, log=print)


def test_other_settings_and_other_files_are_refused(folder: Path, source: Path, tokenizer: str, tmp_path: Path):
    with pytest.raises(UserError, match="begun with another near_duplicates, shard_tokens"):
        prepare_folder(options(source, folder, tokenizer, near_duplicates=0.0, shard_tokens=9), print)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepare_folder(options(source, tmp_path, tokenizer), print)


def test_what_leaks_is_refused_and_the_shards_are_kept(documents: list[str], tokenizer: str, tmp_path: Path):
    """Each document twice, the second time with another beginning: equal to nothing, held out or not at random."""
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": text}) + "\n" for text in (*documents, *("Once more. " + text for text in documents))
        )
    )
    config = options(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, near_duplicates=0.0, max_leak=5.0)
    with pytest.raises(UserError, match=r"of the held-out 13-grams stand in the training split too"):
        prepare_folder(config, print)
    before = arrays(tmp_path / "out")
    config = replace(config, max_leak=100.0)
    manifest = prepare_folder(config, print)
    assert arrays(tmp_path / "out") == before
    assert manifest["leak"]["leaked_documents"] >= 0.5 * manifest["leak"]["documents"]


def test_a_worker_that_is_killed_is_named(
    source: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill_a_worker(*_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # one that ends meanwhile
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    monkeypatch.setattr(build.ShardWriter, "add", kill_a_worker)
    with pytest.raises(RuntimeError, match="fewer --workers"):
        prepare_folder(options(source, tmp_path / "out", tokenizer), print)
    assert os.listdir(tmp_path / "out")
