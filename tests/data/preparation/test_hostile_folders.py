"""Prepared folders, cache entries and tokenizers that are made up or damaged: one sentence, nothing outside read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.config import CorpusConfig, SourceConfig
from ds_stacking.data.batches import MaskedBatches
from ds_stacking.data.manifests import SPLITS, Damaged, sum_up
from ds_stacking.data.masking import Masker
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.data.preparation.folder import prepare_folder
from ds_stacking.data.preparation.prepare import prepare
from ds_stacking.data.sequences import SequenceReader
from ds_stacking.data.token_file import Split, TokenFile, looked_at, map_array
from ds_stacking.data.tokenizer import SpecialIds, load_tokenizer, train_tokenizer

SHARD = Path("shard-00000")


@pytest.fixture(scope="module")
def tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, 600, True).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def source(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "docs"
    prepare_folder(options(source, folder, tokenizer), print)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "docs")


def options(source: Path | str, folder: Path, tokenizer: Path, **fields: object) -> PreparationConfig:
    base = {"sentences": True, "max_leak": 100.0, "workers": 1, "corpus": SourceConfig(eval_percent=30.0)}
    return PreparationConfig(
        data=str(source),
        output_dir=str(folder),
        tokenizer=str(tokenizer),
        **{**base, **fields},  # type: ignore[arg-type]
    )


def train_on(folder: Path, **fields: Any) -> object:
    config = CorpusConfig(sequence_length=32, eval_percent=30, cache_dir=str(folder.parent / "cache"), **fields)
    return prepare(str(folder), "train", config, log=lambda _: None)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rehash(folder: Path) -> None:
    """Make all hashes and sums right again."""
    shard, manifest = json.loads((folder / SHARD / "manifest.json").read_text()), folder / "manifest.json"
    for split in SPLITS:
        for kind, name in (
            ("", f"{split}.bin"),
            ("offsets_", f"{split}_offsets.npy"),
            ("sentences_", f"{split}_sentences.npy"),
        ):
            shard[split][f"{kind}sha256"] = sha256((folder / SHARD / name).read_bytes()).hexdigest()
    for kind in shard["sha256"]:
        shard["sha256"][kind] = sha256((folder / SHARD / f"{kind}.npy").read_bytes()).hexdigest()
    (folder / SHARD / "manifest.json").write_text(json.dumps(shard))
    edit(manifest, lambda content: content.update({split: sum_up(split, [shard]) for split in SPLITS}))


def linked(path: Path) -> None:
    """Move a file or folder out of the prepared folder and put a link in its place."""
    moved = Path(tempfile.mkdtemp(prefix="moved-", dir=path.parent.parent.parent)) / path.name
    path.rename(moved)
    path.symlink_to(moved)


def saved(name: str, change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """Change an array of the shard; all hashes are right."""

    def save(folder: Path) -> None:
        path = folder / SHARD / name
        values = np.load(path) if path.suffix == ".npy" else np.fromfile(path, np.uint16)
        changed = change(values)
        values = changed if isinstance(changed, np.ndarray) else values
        np.save(path, values) if path.suffix == ".npy" else values.tofile(path)
        rehash(folder)

    return save


def manifest(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "manifest.json", lambda content: content.update(fields))


def shard_manifest(split: str = "", **fields: object) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder / SHARD / "manifest.json", lambda content: (content[split] if split else content).update(fields)
    )


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is not finished"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), "field required"),
    "no JSON": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "is no JSON"),
    "nested": (lambda f: (f / "manifest.json").write_text('{"a":' * 10**5), "is no JSON"),
    "no shards": (manifest(shards=[]), "shards: "),
    "shards elsewhere": (manifest(shards=["../../etc"]), "names shards that are none"),
    "absolute shards": (manifest(shards=["/etc"]), "names shards that are none"),
    "a shard twice": (manifest(shards=["shard-00000"] * 2), "names shards that are none"),
    "shards that are no names": (manifest(shards=[1]), "shards.0: "),
    "NaN": (lambda f: edit(f / "manifest.json", lambda c: c.update(max_leak=float("nan"))), "max_leak: "),
    "other sums": (manifest(train={"documents": 1, "tokens": 1, "sha256": "0" * 64}), "are not those of its manifest"),
    "huge vocabulary": (manifest(vocab_size=10**12), "vocab_size: "),
    "other vocabulary": (manifest(vocab_size=599), "another vocab_size"),
    "shard without manifest": (lambda f: (f / SHARD / "manifest.json").unlink(), "cannot be read"),
    "shard gone": (lambda f: shutil.rmtree(f / SHARD), "cannot be read"),
    "no tokens": (shard_manifest("train", tokens=10**30), "are not those of its manifest"),
    "negative": (shard_manifest("train", tokens=-1), "train.tokens: "),
    "dtype of objects": (shard_manifest(dtype="O"), "dtype: "),
    "no hash": (shard_manifest("eval", sha256=5), "eval.sha256: "),
    "tokens gone": (lambda f: (f / SHARD / "train.bin").unlink(), "train.bin cannot be read"),
    "tokens cut": (lambda f: os.truncate(f / SHARD / "train.bin", 100), "has 100 bytes instead of"),
    "tokens longer": (lambda f: os.truncate(f / SHARD / "train.bin", 10**7), "has 10,000,000 bytes instead of"),
    "offsets cut": (lambda f: os.truncate(f / SHARD / "train_offsets.npy", 200), "has 200 bytes instead of"),
    "linked tokens": (lambda f: linked(f / SHARD / "train.bin"), "is a link"),
    "linked offsets": (lambda f: linked(f / SHARD / "eval_offsets.npy"), "is a link"),
    "linked sentences": (lambda f: linked(f / SHARD / "train_sentences.npy"), "is a link"),
    "linked shard": (lambda f: linked(f / SHARD), "is a link"),
    "linked manifest": (lambda f: linked(f / "manifest.json"), "is a link"),
    "linked tokenizer": (lambda f: linked(f / "tokenizer"), "is a link"),
    "linked tokenizer.json": (lambda f: linked(f / "tokenizer" / "tokenizer.json"), "is a link"),
    "a pipe": (
        lambda f: ((f / SHARD / "train.bin").unlink(), os.mkfifo(f / SHARD / "train.bin")),
        "is no regular file",
    ),
    "objects": (
        saved("train_offsets.npy", lambda a: np.array([{}], object)),
        "train_offsets.npy (is no array|holds object)",
    ),
    "floats": (saved("train_offsets.npy", lambda a: a.astype(float)), "holds float64 of shape"),
    "a matrix": (saved("train_offsets.npy", lambda a: a[None]), "holds int64 of shape"),
    "no documents": (saved("train_offsets.npy", lambda a: a[:1]), "offsets that are not those of"),
    "offsets outside": (
        saved("train_offsets.npy", lambda a: a.__setitem__(3, 2**60)),
        "documents that end before they begin",
    ),
    "negative offsets": (
        saved("train_offsets.npy", lambda a: a.__setitem__(3, -(2**60))),
        "documents that end before they begin",
    ),
    "sentences outside": (saved("train_sentences.npy", lambda a: a.__setitem__(3, 2**32 - 1)), "sentences that begin"),
    "sentences that descend": (saved("train_sentences.npy", lambda a: a[::-1]), "sentences that begin"),
    "tokens beyond": (saved("train.bin", lambda a: a.__setitem__(5, 600)), "tokens beyond the 600"),
    "other tokenizer": (
        lambda f: train_tokenizer(["another vocabulary"] * 9, 100, True).save_pretrained(str(f / "tokenizer")),
        "entries, the data 600",
    ),
    "damaged tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_when_it_is_opened(folder: Path, name: str):
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        train_on(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


QUICK = {"empty manifest", "shard gone", "linked shard", "tokens beyond"}
REPAIRED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in DAMAGES
    if not name.startswith(("linked manifest", "linked tokenizer", "other tokenizer", "damaged tokenizer"))
]


@pytest.mark.parametrize("name", REPAIRED)
def test_the_command_that_made_a_folder_repairs_it(
    folder: Path, finished: Path, source: Path, tokenizer: Path, name: str
):
    DAMAGES[name][0](folder)
    outside = {path: path.stat().st_mtime_ns for path in folder.parent.parent.glob("moved-*/**/*")}
    lines: list[str] = []
    prepare_folder(options(source, folder, tokenizer), lines.append)
    assert not any("is finished" in line for line in lines)
    for path in finished.glob("shard-*/*"):
        assert (folder / path.relative_to(finished)).read_bytes() == path.read_bytes()
    prepare_folder(options(source, folder, tokenizer), lines.append)
    assert "is finished; 1 shards" in lines[-1]
    assert all(path.stat().st_mtime_ns == time for path, time in outside.items())
    train_on(folder)


def test_hashes_are_compared_on_request(folder: Path):
    """A byte that no other check sees: a token that might have stood there."""
    path = folder / SHARD / "train.bin"
    values = np.fromfile(path, np.uint16)
    values[7] ^= 1
    values.tofile(path)
    train_on(folder)
    with pytest.raises(UserError, match=r"train\.bin is damaged; copy the folder again"):
        train_on(folder, verify=True)
    with pytest.raises(UserError, match=r"train\.bin is damaged; copy the folder again"):
        prepare_folder(PreparationConfig(output_dir=str(folder), verify=True), print)
    assert path.read_bytes() == values.tobytes(), "verifying makes nothing"


def test_a_whole_folder_is_verified_without_its_source(finished: Path):
    lines: list[str] = []
    prepare_folder(PreparationConfig(output_dir=str(finished), verify=True), lines.append)
    assert lines == [f"{finished}: the tokenizer and every byte of 1 shards are what was written."]
    assert train_on(finished, verify=True)
    with pytest.raises(UserError, match="is not finished"):
        prepare_folder(PreparationConfig(output_dir=str(finished / "none"), verify=True), print)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        *(str(SHARD / n) for n in ("train.bin", "train_offsets.npy", "counts.npy")),
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: os.truncate(path, 9), lambda path: path.write_text("{}")]
)
def test_a_damaged_cache_entry_is_made_again(
    source: Path, tokenizer: Path, tmp_path: Path, name: str, damage: Callable
):
    config = CorpusConfig(cache_dir=str(tmp_path), sequence_length=32, eval_percent=30, max_leak=100)
    first = prepare(str(source), str(tokenizer), config, log=print)
    damage(first.folder / name)
    lines: list[str] = []
    again = prepare(str(source), str(tokenizer), config, log=lines.append)
    assert "this entry of the cache is made again" in lines[0]
    assert again.fingerprint == first.fingerprint and len(again.train) == again.manifest["train"]["tokens"]
    assert prepare(str(source), str(tokenizer), config, log=lines.append).fingerprint == first.fingerprint


def test_counts_of_other_tokens_are_damage(source: Path, tokenizer: Path, tmp_path: Path):
    """The unigram line rests on them."""
    config = CorpusConfig(cache_dir=str(tmp_path), sequence_length=32, eval_percent=30, max_leak=100)
    first = prepare(str(source), str(tokenizer), config, log=print)
    counts = np.load(first.folder / SHARD / "counts.npy")
    lines: list[str] = []
    for change in ((9, -1), (9, counts[9] + 1)):
        np.put(wrong := counts.copy(), *change)
        np.save(first.folder / SHARD / "counts.npy", wrong)
        again = prepare(str(source), str(tokenizer), config, log=lines.append)
        assert (np.load(again.folder / SHARD / "counts.npy") == counts).all()
    assert sum("holds the counts of other tokens" in line for line in lines) == 2


def test_hashes_of_a_cache_entry_are_compared_on_request(source: Path, tokenizer: Path, tmp_path: Path):
    config = CorpusConfig(cache_dir=str(tmp_path), sequence_length=32, eval_percent=30, max_leak=100, verify=True)
    first = prepare(str(source), str(tokenizer), config, log=print)
    path = first.folder / SHARD / "train.bin"
    written = path.read_bytes()
    path.write_bytes(written[:100] + written[98:100] + written[102:])
    prepare(str(source), str(tokenizer), config, log=print)
    assert path.read_bytes() == written


def test_a_large_array_is_looked_at_in_places_and_never_read_outside(
    special: SpecialIds, monkeypatch: pytest.MonkeyPatch
):
    """What opening did not see ends in a sentence too, or in sequences that are no worse than cut elsewhere."""
    tokens = np.full(10_000, 50, np.uint16)
    offsets = np.arange(0, 10_001, 10)
    offsets[400:420] = np.array([2**62, -(2**62)] * 10)
    split = Split(files=[TokenFile(tokens=tokens, offsets=offsets)])
    reader = SequenceReader(split, sequence_length=32, special=special, separate_documents=True)
    bounds = reader.read(np.arange(len(reader)), np.zeros(len(reader), np.uint64)).cu_seqlens
    assert bounds is not None and bounds[0] == 0 and bounds[-1] == 32 * len(reader) and (np.diff(bounds) > 0).all()
    tokens[9000:] = 60_000
    batches = MaskedBatches(
        split,
        sequence_length=32,
        masking_rate=0.15,
        masker=Masker(special=special, vocab_size=100),
        special=special,
        seed=1,
    )
    with pytest.raises(RunFailed, match="hold the token 60,000, beyond the 100"):
        batches.batch(np.arange(len(batches)))


def test_an_array_that_ends_before_its_header_does_is_damaged(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(5))
    content = (tmp_path / "a.npy").read_bytes()
    for cut in range(len(content)):
        (tmp_path / "a.npy").write_bytes(content[:cut])
        with pytest.raises(Damaged):
            map_array(tmp_path, "a.npy", np.int64)
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + content[10:])
    with pytest.raises(Damaged, match="a version of .npy"):
        map_array(tmp_path, "a.npy", np.int64)
    with pytest.raises(Damaged, match="leads out of"):
        map_array(tmp_path / "b", "../a.npy", np.int64)


def test_looked_at_places_are_spread():
    parts = list(looked_at(np.arange(2**20), whole=False, most=2**15))
    assert len(parts) == 2 and parts[0][0] == 0 and parts[-1][-1] == 2**20 - 1
    assert sum(map(len, looked_at(np.arange(2**20), whole=True))) >= 2**20


BAD_TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is damaged .*is no JSON"),
    "an array": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json is damaged"),
    "no model": (lambda f: (f / "tokenizer.json").write_text("{}"), "model: field required"),
    "a model of another kind": (
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"].update(type="Unheard")),
        "cannot be loaded",
    ),
    "an id out of range": (
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["vocab"].update(word=2**32 - 2)),
        "has the token id 4,294,967,294",
    ),
    "a negative id": (
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["vocab"].update(word=-1)),
        "cannot be loaded",
    ),
    "config no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is damaged"),
    "config an array": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json is damaged"),
    "config nested": (
        lambda f: (f / "tokenizer_config.json").write_text('{"a":' * 10**5),
        "tokenizer_config.json is damaged",
    ),
    "class no text": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(tokenizer_class=["a"])),
        "tokenizer_class: ",
    ),
    "added tokens of another kind": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"a": 5})),
        "cannot be loaded",
    ),
    "a link": (lambda f: linked(f / "tokenizer.json"), "is a link"),
    "a folder": (lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.json").mkdir()), "tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_refused(tokenizer: Path, tmp_path: Path, name: str):
    folder = shutil.copytree(tokenizer, tmp_path / "a" / "tokenizer")
    BAD_TOKENIZERS[name][0](folder)
    with pytest.raises(UserError, match=BAD_TOKENIZERS[name][1]) as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_tokenizer_that_names_a_file_elsewhere_is_not_followed(tokenizer: Path, tmp_path: Path):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    train_tokenizer(["another vocabulary"] * 9, 100, True).save_pretrained(str(tmp_path / "other"))
    other = str(tmp_path / "other" / "tokenizer.json")
    edit(folder / "tokenizer_config.json", lambda content: content.update(tokenizer_file=other, vocab_file=other))
    assert len(load_tokenizer(str(folder))) == 600


def test_a_panic_becomes_a_sentence(tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):
        """What a panic of Rust is in Python."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("ds_stacking.data.tokenizer.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(UserError, match=r"cannot be loaded \(index out of bounds\)"):
        load_tokenizer(str(tokenizer))
