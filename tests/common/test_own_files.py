"""Nothing is reached through a link inside a folder, in whatever component it lies and whenever it came there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_text
from ds_stacking.common.own_files import is_inside, make_inside, open_inside, read_inside


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a file in a folder, and beside it a secret that links lead to."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "report" / "page").write_text("page")
    return tmp_path / "run"


def test_files_are_read_and_written_and_the_folder_itself_may_be_a_link(run: Path) -> None:
    link = run.parent / "link"
    link.symlink_to(run)
    assert read_inside(link, "report/page") == b"page"
    write_text(link / "report" / "page", "new", inside=link)
    assert (run / "report" / "page").read_text() == "new"
    assert make_inside(link, "a", "b") == link / "a" / "b" and (run / "a" / "b").is_dir()
    assert make_inside(link, "a", "b").is_dir(), "what is there already is as good"


@pytest.mark.parametrize("name", ["link", "folder/key", "dangling", "report/up"])
def test_links_are_refused_and_what_they_lead_to_stays(run: Path, name: str) -> None:
    (run / "link").symlink_to("../secret/key")
    (run / "folder").symlink_to("../secret")
    (run / "dangling").symlink_to("../secret/new")
    (run / "report" / "up").symlink_to("../../secret/key")
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.* is a link to .*secret.*remove the link"):
        read_inside(run, name)
    with pytest.raises(UserError, match="is a link to"):
        os.close(open_inside(run, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    if name == "folder/key":
        with pytest.raises(UserError, match="is a link to"):
            write_text(run / name, "over", inside=run)
    assert [path.name for path in (run.parent / "secret").iterdir()] == ["key"]
    assert (run.parent / "secret" / "key").read_text() == "secret"


def test_a_folder_that_is_a_link_is_not_made_into_one(run: Path) -> None:
    (run / "export").symlink_to("../secret")
    for names in (("export",), ("export", "stage-1")):
        with pytest.raises(UserError, match="export is a link"):
            make_inside(run, *names)
    assert [path.name for path in (run.parent / "secret").iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["", "..", "../secret/key", "/etc/passwd", "report/../../secret/key", "a\0b"])
def test_paths_out_of_the_folder_are_refused(run: Path, name: str) -> None:
    assert not is_inside(name)
    with pytest.raises(UserError, match="leads out of|only files in that folder"):
        read_inside(run, name)


def test_pipes_sockets_and_folders_are_no_files_and_are_not_waited_for(run: Path) -> None:
    os.mkfifo(run / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "socket"))
    for name in ("pipe", "socket", "report"):
        with pytest.raises(UserError, match="is no regular file; remove it"):
            read_inside(run, name)
    with pytest.raises(UserError, match="no regular file"):
        os.close(open_inside(run, "pipe", os.O_WRONLY))


def test_what_is_not_there_is_an_error_of_the_system(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report/none"):
        read_inside(run, "report/none")
    with pytest.raises(FileNotFoundError):
        read_inside(run, "none/page")


def test_a_file_that_is_too_large_is_not_read(run: Path) -> None:
    with open(run / "huge", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        read_inside(run, "huge", limit=1000)
