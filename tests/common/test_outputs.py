"""Where a command is to write: what cannot be is refused, and nothing is made to find that out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.outputs import check_output_file, check_output_folder, writing


def test_folders_that_are_there_or_can_be_made_are_fine(tmp_path: Path) -> None:
    assert check_output_folder(str(tmp_path / "a" / "b"), "--out") == tmp_path / "a" / "b"
    assert check_output_file(str(tmp_path / "a"), "--out") == tmp_path / "a"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is ''; name a"),
        ("\n", r"is '\\n'; name a"),
        ("x" * 10_000, "File name too long"),
        ("a\0b", "null"),
        ("file/a", "is no folder|lies in no folder"),
        ("dangling/a", "leads nowhere"),
        ("circle", "symbolic links"),
    ],
)
def test_the_others_are_refused(tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    Path("circle").symlink_to("circle")
    for check in (check_output_file, check_output_folder):
        with pytest.raises(UserError, match=words) as error:
            check(name, "--out")
        assert str(error.value).startswith("--out") and len(str(error.value)) < 300
    with pytest.raises(UserError, match="is no folder"):
        check_output_folder("file", "--out")
    with pytest.raises(UserError, match="is a folder"):
        check_output_file(".", "--out")


def test_what_the_disk_says_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="report cannot be written .No such file"), writing(tmp_path / "report"):
        os.rmdir(tmp_path / "nothing")
