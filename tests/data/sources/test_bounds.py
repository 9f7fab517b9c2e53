"""Bounds of what is read: bombs are refused in bounded memory, each with a sentence that names the option to raise."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.sources import streams
from ds_stacking.data.sources.parquet_pages import read_pages
from ds_stacking.data.sources.text_files import read_file

SIZE = 3 * 10**9
MEMORY = 500 * 2**20
PAGE = "<page><title>A</title><ns>0</ns><revision><text>{}</text></revision></page>"
ENTITIES = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
LAUGHS = f'<!DOCTYPE m [<!ENTITY e0 "ha">{ENTITIES}]><m>' + PAGE.format("&e9;") + "</m>"
FOREIGN = '<!DOCTYPE m [<!ENTITY e SYSTEM "file:///etc/hostname">]><m>' + PAGE.format("&e;") + "</m>"


def read(path: Path, **config: object) -> tuple[list[str], dict[str, str]]:
    skipped: dict[str, str] = {}
    return list(read_file(path, SourceConfig(**config), skipped)), skipped  # type: ignore[arg-type]


def bomb(head: bytes, tail: bytes) -> bytes:
    """`head`, three gigabytes of one letter and `tail`: some hundred kB of zstd."""
    output = io.BytesIO()
    with zstandard.ZstdCompressor(write_content_size=False).stream_writer(output, closefd=False) as writer:
        writer.write(head)
        for _ in range(SIZE // 10**7):
            writer.write(b"a" * 10**7)
        writer.write(tail)
    return output.getvalue()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "line.txt.zst").write_bytes(content := bomb(b"", b"\n"))
    assert len(content) < 400_000
    (folder / "line.jsonl.zst").write_bytes(bomb(b'{"text": "', b'"}\n'))
    (folder / "page.xml.zst").write_bytes(bomb(b"<m><page><title>A</title><revision><text>", b"</text>"))
    (folder / "tag.xml.zst").write_bytes(bomb(b"<m><", b"/></m>"))
    return folder


def in_child(function: Callable[[], str]) -> str:
    """What `function` returns in a process that may take MEMORY more than this one has."""
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            os.write(into, function().encode()[:4000])
        except BaseException as error:
            os.write(into, repr(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as answer:
        text = answer.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return text


@pytest.mark.parametrize(
    ("name", "limits", "words"),
    [
        ("line.txt.zst", {}, "1,000 times its size .* raise corpus.max_expansion"),
        ("line.jsonl.zst", {}, "1,000 times its size .* raise corpus.max_expansion"),
        ("line.jsonl.zst", {"max_expansion": 10**6}, "line 1: more than 67,108,864 .* raise corpus.max_document"),
        ("page.xml.zst", {}, "page 'A', line 1: a text of more than 67,108,864 .* raise corpus.max_document"),
        ("tag.xml.zst", {"max_expansion": 10**6}, "a tag or comment of more than 1,048,576 bytes"),
    ],
)
def test_a_bomb_is_refused_in_bounded_memory(bombs: Path, name: str, limits: dict, words: str):
    def run() -> str:
        try:
            read(bombs / name, **limits)
        except UserError as error:
            return str(error)
        return "nothing was refused"

    found = in_child(run)
    assert name in found and "\n" not in found
    assert re.search(words, found), found


def test_a_long_line_of_text_comes_in_pieces(tmp_path: Path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"a" * 10**7))
    documents, skipped = read(path, max_document=10)
    assert sum(map(len, documents)) == 10**7 and len(documents) == 3 and skipped == {}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "short"}\n{"text": "' + "x" * 100 + '"}\n', "a.jsonl, line 2: more than 50 characters"),
        (
            "a.xml",
            "<m>" + PAGE.format("x" * 100) + "</m>",
            "a.xml, page 'A', line 1: a text of more than 50 characters",
        ),
        ("a.xml", LAUGHS, "a document type .DOCTYPE., which no dump has"),
        ("a.xml", FOREIGN, "a document type .DOCTYPE., which no dump has"),
        ("a.xml", "<m>" * 100_000, "elements nested more than 64 deep"),
        ("a.xml", "<m><!--" + "x" * 2**22, "a tag or comment of more than 1,048,576 bytes"),
    ],
)
def test_what_is_beyond_a_bound_is_refused(tmp_path: Path, name: str, content: str, words: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name, max_document=50)


def test_of_a_page_with_many_revisions_the_last_is_read_and_the_largest_counts(tmp_path: Path):
    revisions = "".join(f"<revision><text>{n:040d}</text></revision>" for n in range(100))
    (tmp_path / "a.xml").write_text(f"<m><page><ns>0</ns>{revisions}</page></m>")
    assert read(tmp_path / "a.xml", max_document=50)[0] == [f"{99:040d}"]


@pytest.mark.parametrize("size", [2**27, 2**31], ids=str)
def test_a_window_is_bounded(tmp_path: Path, size: int):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(b"text") + compressor.flush())
    if size > 2**28:
        assert read(tmp_path / "a.txt.zst", zstd_window=size) == (["text"], {})
        return
    with pytest.raises(UserError, match=r"zstd window of more than 134,217,728 bytes.*corpus\.zstd_window"):
        read(tmp_path / "a.txt.zst", zstd_window=size)


TEXT = b"".join(b"line %d of many\n\n" % number for number in range(20_000))
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_all_frames_are_read_and_damage_is_found(tmp_path: Path, suffix: str):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}[suffix]
    first, second = compress(TEXT[:100_000]), compress(TEXT[100_000:])
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(first + second)
    assert "".join(read(path)[0]).split() == TEXT.decode().split()
    for damaged in (first + second[:-9], first + second + b"garbage at the end", first + b"garbage" + second):
        path.write_bytes(damaged)
        documents, skipped = read(path)
        assert documents == [] and "not readable" in skipped[str(path)]


def test_skippable_frames_are_skipped(tmp_path: Path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(SKIPPABLE + zstandard.compress(b"one ") + SKIPPABLE + zstandard.compress(b"two") + SKIPPABLE)
    assert read(path) == (["one two"], {})


def table(path: Path, texts: pyarrow.Array, **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", **options)
    return path


def test_a_parquet_value_that_is_too_long_is_refused(tmp_path: Path):
    path = table(tmp_path / "a.parquet", pyarrow.array(["short", "x" * 100]))
    with pytest.raises(UserError, match=r"a\.parquet, rows 0 to 2: a text has 100 bytes, more than corpus.max_doc"):
        read(path, max_document=50)


def test_a_parquet_page_that_is_too_large_is_refused(tmp_path: Path):
    path = table(tmp_path / "a.parquet", pyarrow.array([f"{n} text" * 20 for n in range(500)]), use_dictionary=False)
    with pytest.raises(UserError, match=r"row group 0: a page .* more than 16 times corpus.max_document \(150\)"):
        read(path, max_document=150)


def test_a_parquet_value_in_every_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ds_stacking.data.sources.parquet_files.PLAUSIBLE", 10**6)
    value = os.urandom(500).hex()
    path = table(tmp_path / "a.parquet", pyarrow.array([value] * 10_000))
    assert path.stat().st_size < 5000
    with pytest.raises(UserError, match="column 'text' becomes more than 1,000 times its size"):
        read(path)
    assert len(read(path, max_expansion=10**6)[0]) == 10_000


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_are_known_by_their_headers(tmp_path: Path, version: str, dictionary: bool):
    texts = [f"text number {n % 700}" * (n % 30) for n in range(5000)]
    options = {"data_page_version": version, "use_dictionary": dictionary, "row_group_size": 2000}
    path = table(tmp_path / "a.parquet", pyarrow.array(texts), data_page_size=5000, **options)
    metadata = pyarrow.parquet.read_metadata(path)
    with path.open("rb") as file:
        for number in range(metadata.num_row_groups):
            pages = list(read_pages(file, metadata.row_group(number).column(0)))
            assert sum(page.values for page in pages if not page.is_dictionary) == metadata.row_group(number).num_rows
            assert any(page.is_dictionary for page in pages) == dictionary
    assert read(path)[0] == [text for text in texts if text]


def test_rows_that_are_not_utf_8_are_left_out_and_counted(tmp_path: Path):
    offsets, data = pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfeok")
    path = table(tmp_path / "a.parquet", pyarrow.StringArray.from_buffers(2, offsets, data))
    assert read(path) == (["ok"], {str(path): "1 of its rows are not UTF-8 text"})


def test_a_parquet_file_with_flipped_bytes_never_fails_otherwise(tmp_path: Path):
    """Each of the last 300 bytes, where the metadata are, and every tenth before."""
    path = table(tmp_path / "a.parquet", pyarrow.array([f"some text {n}" for n in range(300)]))
    content = path.read_bytes()
    for place in [*range(4, len(content) - 300, 10), *range(len(content) - 300, len(content))]:
        flipped = bytearray(content)
        flipped[place] ^= 0x55
        path.write_bytes(flipped)
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_json_nested_without_end_is_a_line_that_is_no_object(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert read(path) == (["good"], {str(path): "1 of its lines are not JSON objects"})


def test_names_that_are_no_text_are_printable(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J.txt"))
    path.write_bytes(b"\xff")
    _, skipped = read(path)
    (name,) = skipped
    assert name.isprintable() and name.encode() and "caf\\udce9\\x1b[2J.txt" in name


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 10**12},
        {"vocab_size": 0},
        {"vocab_size": -5},
        {"max_documents": 10**30},
        {"max_document": 0},
        {"max_expansion": 0},
        {"zstd_window": 2**40},
        {"column": ""},
        {"split": "\0"},
    ],
    ids=str,
)
def test_settings_beyond_all_bounds_are_refused(fields: dict):
    with pytest.raises(UserError, match=f"^corpus.{next(iter(fields))} (is|holds) "):
        SourceConfig(**fields)


def test_the_pieces_of_a_decompressor_are_small(tmp_path: Path):
    """Of any 1,024 bytes of zstd come no more than 32 MB."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(bytes(10**8)))
    with streams.open_stream(path, SourceConfig(max_expansion=10**6)) as file:
        assert sum(len(chunk) for chunk in iter(lambda: file.read(2**20), b"")) == 10**8
