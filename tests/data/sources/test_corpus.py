"""The three kinds of source and what is refused."""

import os
from itertools import islice
from pathlib import Path

import datasets
import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.config import CorpusConfig
from ds_stacking.data.sources.corpus import identify_source, iterate_documents


def refusal(source: str, config: CorpusConfig) -> str:
    with pytest.raises(UserError) as caught:
        list(iterate_documents(source, config))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "from a"}\n{"text": " "}\n')
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("not a known format")
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A local folder in hub format behind the name `someone/books`; everything else goes to the real loader."""
    data = tmp_path / "books" / "data"
    data.mkdir(parents=True)
    for split, texts in {"train": ["one", "two", None, "three"], "test": ["four"]}.items():
        table = datasets.Dataset.from_dict({"title": ["t"] * len(texts), "text": texts})
        table.to_parquet(data / f"{split}-00000-of-00001.parquet")
    load = datasets.load_dataset

    def load_local(name: str, subset: str | None, **options: object) -> object:
        assert name == "someone/books"
        return load(str(tmp_path / "books"), subset, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return "someone/books"


def test_folder_file_and_glob(folder: Path):
    config = CorpusConfig()
    assert list(iterate_documents(str(folder), config)) == ["from b", "from a"]
    assert list(iterate_documents(str(folder / "b.txt"), config)) == ["from b"]
    assert list(iterate_documents(str(folder / "**" / "*.jsonl"), config)) == ["from a"]
    assert list(iterate_documents(str(folder), CorpusConfig(max_documents=1))) == ["from b"]


def test_unreadable_files_are_reported_and_the_rest_is_read(folder: Path):
    (folder / "c.txt").write_bytes(b"\x80\x81")
    skipped: dict[str, str] = {}
    assert list(iterate_documents(str(folder), CorpusConfig(), skipped)) == ["from b", "from a"]
    assert skipped == {str(folder / "c.txt"): "not UTF-8 text"}


@pytest.mark.parametrize("source", ["./nothing", "/no/such/folder", "no/such/folder", "gone.txt", "~/gone/", "x*.txt"])
def test_a_path_that_does_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert repr(source) in refusal(source, CorpusConfig())


def test_sources_without_text(tmp_path: Path):
    assert "no file to read" in refusal(str(tmp_path), CorpusConfig())
    (tmp_path / "a.txt").write_text(" \n\n")
    assert "holds no text" in refusal(str(tmp_path), CorpusConfig())
    (tmp_path / "a.txt").write_bytes(b"\0")
    assert "binary" in refusal(str(tmp_path), CorpusConfig())
    (tmp_path / "a.csv").write_text("a,b")
    assert ".parquet" in refusal(str(tmp_path / "a.csv"), CorpusConfig())


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(hub: str, streaming: bool):
    assert list(iterate_documents(hub, CorpusConfig(streaming=streaming))) == ["one", "two", "three"]
    assert list(iterate_documents(hub, CorpusConfig(streaming=streaming, split="test"))) == ["four"]
    assert "'title', 'text'" in refusal(hub, CorpusConfig(streaming=streaming, column="body"))


def test_a_hub_dataset_that_cannot_be_loaded(hub: str):
    assert "corpus.split" in refusal(hub, CorpusConfig(split="validation"))
    assert "corpus.subset" in refusal(hub, CorpusConfig(subset="german"))


def test_the_hub_loader_is_never_told_to_trust_code(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, object] = {}

    def load(name: str, subset: str | None, **options: object) -> datasets.Dataset:
        seen.update(options)
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(iterate_documents("a/b", CorpusConfig(revision="abc"))) == ["one"]
    assert seen == {"split": "train", "revision": "abc", "streaming": False}


def test_documentation_is_prose():
    texts = list(islice(iterate_documents("docs", CorpusConfig()), 20))
    assert texts == list(iterate_documents("docs", CorpusConfig(max_documents=20)))
    assert min(map(len, texts)) >= 200
    assert sum(" the " in text for text in texts) > 15


def test_identity_changes_with_what_determines_the_documents(folder: Path):
    def identity(source: str = str(folder), **fields: object) -> dict:
        return identify_source(source, CorpusConfig(**fields))

    base = identity()
    assert identity(streaming=True, sequence_length=128, cache_dir="x") == base
    assert identity(column="body") != base != identity(max_documents=3)
    assert identity("a/b", revision="1") != identity("a/b", revision="2")
    assert identity("docs")["versions"]["python"]
    os.utime(folder / "b.txt", ns=(1, 1))
    assert identity() != base


def place_links(root: Path) -> Path:
    """A corpus with a link out of it, whose target is beside it."""
    (root / "secret").mkdir()
    (root / "secret" / "key.txt").write_text("secret")
    (root / "corpus").mkdir()
    (root / "corpus" / "b.txt").write_text("mine")
    (root / "corpus" / "a.txt").symlink_to("../secret/key.txt")
    (root / "corpus" / "deep").symlink_to("../secret")
    return root / "corpus"


@pytest.mark.parametrize("pattern", ["", "*.txt", "a*", "**/*.txt", "dee[p]/key.txt"])
def test_a_link_out_of_the_source_is_refused(tmp_path: Path, pattern: str):
    corpus = place_links(tmp_path)
    message = refusal(str(corpus / pattern), CorpusConfig())
    assert f"leads to {tmp_path}/secret/key.txt, outside of the data source" in message
    assert "give that file or its folder as --data, or set corpus.follow_links" in message
    with pytest.raises(UserError, match="outside of"):
        identify_source(str(corpus / pattern), CorpusConfig())
    assert "secret" in list(iterate_documents(str(corpus / pattern), CorpusConfig(follow_links=True)))


def test_what_the_user_named_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = place_links(tmp_path)
    assert list(iterate_documents(str(corpus / "a.txt"), CorpusConfig())) == ["secret"]
    for source in (corpus / "deep", corpus / "deep" / "*.txt"):
        assert list(iterate_documents(str(source), CorpusConfig())) == ["secret"]
    (corpus / "a.txt").unlink()
    (corpus / "c.txt").symlink_to("b.txt")
    assert list(iterate_documents(str(corpus), CorpusConfig())) == ["mine", "mine"], "links inside are no way out"
    monkeypatch.chdir(corpus)
    assert list(iterate_documents("*.txt", CorpusConfig())) == ["mine", "mine"]


@pytest.mark.parametrize("given", ["", "*.txt"])
def test_links_inside_a_hub_cache_are_read(tmp_path: Path, given: str):
    cached = tmp_path / "datasets--a--b"
    snapshot = cached / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    (cached / "blobs" / "1").write_text("cached")
    (snapshot / "a.txt").symlink_to("../../blobs/1")
    assert list(iterate_documents(str(snapshot / given), CorpusConfig())) == ["cached"]
    (tmp_path / "key").write_text("secret")
    (cached / "blobs" / "2").symlink_to("../../key")
    (snapshot / "b.txt").symlink_to("../../blobs/2")
    assert f"leads to {tmp_path}/key" in refusal(str(snapshot / given), CorpusConfig())
