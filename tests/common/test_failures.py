"""Exceptions as sentences: those that have one, and the files into which the tracebacks of the others go."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_stacking.common.errors import OtherRankFailed, RunFailed, UserError
from ds_stacking.common.failures import explain, keep_tracebacks, take_option


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    keep_tracebacks(None)
    yield
    keep_tracebacks(None)


def of_torch() -> BaseException:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("no machine has that")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("This is wrong; mend it."), "This is wrong; mend it."),
        (RunFailed("It was stopped; look at the data."), "It was stopped; look at the data."),
        (OtherRankFailed("rank 1 failed"), "rank 1 failed"),
        (
            OSError(28, "No space left on device", "/a/b"),
            "/a/b: No space left on device; make room, then .*--resume auto.",
        ),
        (OSError(5, "Input/output error", b"/a"), "b'/a': Input/output error; mend that, .*"),
        (OSError(24, "Too many open files"), "Too many open files; mend that, .*"),
        (MemoryError(), r"out of memory \(MemoryError\); lower micro_batch_size .*"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"),
            "out of memory .CUDA out of memory. Tried 2 .*",
        ),
        (of_torch(), "out of memory .*; lower micro_batch_size .*"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "the package a is missing .*pip install.*"),
    ],
)
def test_what_has_a_sentence(error: BaseException, sentence: str, tmp_path: Path) -> None:
    keep_tracebacks(tmp_path)
    said = explain(error, 0)
    assert re.fullmatch(sentence, said) and "\n" not in said
    assert list(tmp_path.iterdir()) == []


def raised() -> BaseException:
    try:
        raise KeyError("a")
    except KeyError as error:
        return error


def test_a_traceback_goes_into_the_run_directory(tmp_path: Path) -> None:
    keep_tracebacks(tmp_path)
    old = os.umask(0)
    try:
        said = explain(raised(), 3)
    finally:
        os.umask(old)
    path = tmp_path / "traceback-rank3.txt"
    assert said == f"KeyError: 'a'; the full traceback is in {path}"
    assert path.read_text().startswith("Traceback (most recent call last):") and "test_failures.py" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("where", ["gone", "a file", "no folder"])
def test_or_into_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a file").touch()
    if where != "no folder":
        keep_tracebacks(tmp_path / where)
    said = explain(raised(), 0)
    (path,) = tmp_path.glob("ds_stacking-*/traceback-rank0.txt")
    assert said.endswith(f"the full traceback is in {path}")
    assert "KeyError" in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run" / "traceback-rank0.txt").symlink_to(tmp_path / "outside")
    keep_tracebacks(tmp_path / "run")
    explain(raised(), 0)
    assert (tmp_path / "outside").read_text() == "mine"
    assert "KeyError" in (tmp_path / "run" / "traceback-rank0.txt").read_text()


def test_the_option_is_taken_out() -> None:
    arguments = ["pretrain.py", "--lr", "1", "--traceback"]
    assert take_option(arguments) and arguments == ["pretrain.py", "--lr", "1"]
    assert not take_option(arguments)
