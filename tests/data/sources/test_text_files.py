"""Reading local files: every format, and files that are no text."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ds_stacking.common.errors import UserError
from ds_stacking.config import SourceConfig
from ds_stacking.data.sources import text_files
from ds_stacking.data.sources.text_files import is_supported, read_file

NOVELS = "It was a dark night.\nThe wind blew – hard.\n\n \nCall me Ishmael.\r\n\r\n\nLast one"
EXPECTED = ["It was a dark night.\nThe wind blew – hard.\n", "Call me Ishmael.\n", "Last one"]
RECORDS = [{"text": "Naïve café.\nSecond line"}, {"text": None}, {"text": "雪", "id": 3}]


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        half = len(data) // 2  # two frames, as parallel compressors write
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


def read(path: Path, column: str = "text") -> tuple[list[str], dict[str, str]]:
    skipped: dict[str, str] = {}
    return list(read_file(path, SourceConfig(column=column), skipped)), skipped


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_blank_lines_separate_documents_of_a_text_file(tmp_path: Path, suffix: str, mark: bytes):
    path = tmp_path / f"novels.txt{suffix}"
    path.write_bytes(compress(mark + NOVELS.encode(), suffix))
    assert read(path) == (EXPECTED, {})


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str):
    path = tmp_path / f"records.jsonl{suffix}"
    path.write_bytes(compress("\n".join(map(json.dumps, RECORDS)).encode(), suffix))
    assert read(path) == ([RECORDS[0]["text"], "雪"], {})


def test_parquet(tmp_path: Path):
    path = tmp_path / "records.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    assert read(path) == ([RECORDS[0]["text"], "雪"], {})


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT", 20)
    path = tmp_path / "lines.txt"
    path.write_text("twelve chars\n" * 5 + "x" * 45)
    documents, _ = read(path)
    assert "".join(documents) == path.read_text()
    assert [len(text) for text in documents] == [26, 26, 33, 20, 5]


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("a.txt", b"text \0\1\2", "binary"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "UTF-8"),
        ("a.txt.gz", b"no gzip at all", "not readable"),
        ("a.txt.zst", b"no zstandard at all", "not readable"),
        ("a.txt.gz", gzip.compress(NOVELS.encode() * 100)[:-30], "not readable"),
        ("a.txt.zst", zstandard.compress(NOVELS.encode() * 100)[:-9], "not readable"),
        ("a.parquet", b"PAR1 but no parquet", "parquet"),
    ],
)
def test_a_file_that_is_no_text_is_left_out_whole(tmp_path: Path, name: str, data: bytes, fault: str):
    path = tmp_path / name
    path.write_bytes(data)
    documents, skipped = read(path)
    assert documents == []
    assert list(skipped) == [str(path)] and fault in skipped[str(path)]


def test_bad_json_lines_are_counted(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n[1]\n{"text": "cut sho')
    documents, skipped = read(path)
    assert documents == ["good"]
    assert "2 of its lines" in skipped[str(path)]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b \ud83d\ude00"}')
    assert read(path)[0] == ["a?b 😀"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(("column", "message"), [("body", "'text', 'id'"), ("id", "int[64]*, not text")])
def test_a_wrong_column_is_refused(tmp_path: Path, name: str, column: str, message: str):
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text(json.dumps({"text": "t", "id": 3}))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "t", "id": 3}]), path)
    with pytest.raises(UserError, match=message):
        read(path, column)


def test_formats_are_known_by_their_names():
    assert is_supported(Path("A.TXT.GZ")) and is_supported(Path("x.jsonl.zst")) and is_supported(Path("x.parquet"))
    assert not is_supported(Path("x.csv")) and not is_supported(Path("txt")) and not is_supported(Path("x.tar.gz"))
