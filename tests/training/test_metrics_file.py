"""metrics.jsonl at a resumption: what is no such file is refused before anything is changed, in bounded memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.training import metrics_file
from ds_stacking.training.metrics_file import MetricsFile, check_metrics, cut_metrics

LINE = json.dumps({"kind": "train", "step": 1, "stage": 0, "layers": 2, "loss": 5.5}) + "\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (os.urandom(3000) + b"\n", "line 1, is damaged .*no JSON"),
        (LINE.encode() + b"[]\n", "line 2, is damaged .*its content: input should be an object"),
        (b'{"kind": 3}\n', "line 1, is damaged .*kind: .*valid string"),
        (LINE.replace("1", "-1").encode(), "line 1, is damaged .*step: .*greater than or equal to 0"),
        (b"[" * 100_000 + b"\n", "line 1, is damaged"),
        (b"x" * 10_000_000, "line 1 has more than 4,194,304 bytes"),
    ],
)
def test_what_is_no_line_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"{sentence}.*; move the file away") as refused:
        check_metrics(tmp_path, len(content))
    assert len(str(refused.value)) < 500 and (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_file_of_terabytes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINE)
    os.truncate(tmp_path / "metrics.jsonl", 1 << 40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than any run writes"):
        check_metrics(tmp_path, len(LINE))


@pytest.mark.parametrize(
    ("content", "size", "said"),
    [
        (LINE * 3, 3 * len(LINE), None),
        (LINE * 3, 0, None),
        (LINE * 3 + "garbage", 3 * len(LINE), None),
        (LINE * 2, 3 * len(LINE), "bytes, and had"),
        (LINE * 2 + LINE[:20], 3 * len(LINE), "bytes, and had"),
        (None, 3 * len(LINE), "is gone"),
        (None, 0, None),
    ],
)
def test_what_stays_is_looked_at_and_what_lacks_is_told(
    tmp_path: Path, content: str | None, size: int, said: str | None
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    words = check_metrics(tmp_path, size)
    assert words is None if said is None else said in str(words)
    cut_metrics(tmp_path, size)
    if content is not None:
        assert (tmp_path / "metrics.jsonl").read_text() == content[:size]


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outside = tmp_path / "outside"
    outside.write_text(LINE * 2)
    (tmp_path / "run" / "metrics.jsonl").symlink_to(outside)
    for touch in (
        lambda: check_metrics(tmp_path / "run", 10),
        lambda: cut_metrics(tmp_path / "run", 10),
        lambda: MetricsFile(tmp_path / "run" / "metrics.jsonl"),
    ):
        with pytest.raises(UserError, match="metrics.jsonl is a link to"):
            touch()
    assert outside.read_text() == LINE * 2


def test_a_last_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "LONGEST_LINE", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINE * 5 + LINE[:30])
    MetricsFile(path).close()
    assert path.read_text() == LINE * 5
    path.write_text(LINE + "x" * 200)
    with pytest.raises(UserError, match="its last line has more than 100 bytes; move the file away"):
        MetricsFile(path)
