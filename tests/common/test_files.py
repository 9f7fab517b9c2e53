"""Every file and folder appears whole or not at all: killed, out of space, raced for; what is left goes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_stacking.common.errors import RunFailed, UserError
from ds_stacking.common.files import explain_disk, is_leftover, whole_file, whole_folder, write_json, write_text

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from ds_stacking.common import files

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

path, point = Path(sys.argv[1]), sys.argv[2]
if point == "inside the content":
    with files.whole_file(path) as file:
        file.write(b'{"step": ')
        file.flush()
        die()
calls = {"before the first byte": ("json", "dumps"), "before the fsync": ("os", "fsync"),
         "before the rename": ("os", "replace"), "after the rename": ("os", "fsync")}
module, name = calls[point]
if point == "after the rename":  # the folder's fsync follows the file's
    real = os.fsync
    setattr(os, "fsync", lambda handle: setattr(os, "fsync", die) or real(handle))
else:
    setattr({"json": files.json, "os": files.os}[module], name, die)
files.write_json(path, {"step": 2})
"""
POINTS = ("before the first byte", "inside the content", "before the fsync", "before the rename", "after the rename")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("old", [None, {"step": 1}])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path, point: str, old: object) -> None:
    path = tmp_path / "state.json"
    if old:
        write_json(path, old)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), point], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    found = json.loads(path.read_text()) if path.exists() else None
    assert found == ({"step": 2} if point == "after the rename" else old)
    assert all(is_leftover(other) for other in tmp_path.iterdir() if other != path)
    write_json(path, {"step": 3})
    assert json.loads(path.read_text()) == {"step": 3}


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k)))
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    path, texts = tmp_path / "file", [str(n) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert json.loads((tmp_path / "file").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(body: Callable[[], None]) -> int:
    """The wait status of a fork that runs `body`; 0 where it returned, exit code 7 where it raised OSError."""
    child = os.fork()
    if child == 0:
        try:
            body()
        except OSError:
            os._exit(7)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def fill(folder: Path, content: str = "new") -> None:
    (folder / "a").write_text(content)
    (folder / "b").mkdir()
    (folder / "b" / "c").write_text(content)


def test_it_appears_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "model") as unfinished:
        fill(unfinished)
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "b" / "c").read_text() == "new"


def test_where_the_body_raises_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model") as unfinished:
        fill(unfinished)
        _ = 1 / 0
    assert names(tmp_path) == []


def test_an_empty_folder_is_filled_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with whole_folder(tmp_path / "model") as unfinished:
        fill(unfinished)
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "model") as unfinished:
        fill(unfinished, "newer")
    assert (tmp_path / "model" / "a").read_text() == "new" and names(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_with_replace_what_stood_there_goes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    model = tmp_path / "run" / "model"
    model.parent.mkdir()
    if kind == "folder":
        fill(tmp_path / "elsewhere")
        model.mkdir()
        fill(model, "old")
    elif kind == "file":
        model.write_text("old")
    else:
        model.symlink_to(tmp_path / "elsewhere")
    with whole_folder(model, replace=True) as unfinished:
        fill(unfinished)
    assert names(model) == ["a", "b"] and names(model.parent) == ["model"] and not model.is_symlink()
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"


def test_no_link_below_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(), (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "elsewhere")
    target = tmp_path / "run" / "export" / "model"
    with pytest.raises(UserError, match="is a link"), whole_folder(target, inside=tmp_path / "run"):
        raise AssertionError
    assert names(tmp_path / "elsewhere") == []


def test_what_a_killed_process_left_goes_the_next_time(tmp_path: Path) -> None:
    def killed() -> None:
        with whole_folder(tmp_path / "model") as unfinished:
            fill(unfinished)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    (tmp_path / ".other.0123456789abcdef.tmp").mkdir()
    assert len(names(tmp_path)) == 2 and not (tmp_path / "model").exists()
    with whole_folder(tmp_path / "model") as unfinished:
        fill(unfinished)
    assert names(tmp_path) == [".other.0123456789abcdef.tmp", "model"]


def test_what_another_process_is_filling_stays(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "model") as slow:
        fill(slow, "slow")
        with whole_folder(tmp_path / "model") as fast:
            fill(fast, "fast")
        assert (slow / "a").read_text() == "slow"
        (tmp_path / "model").rename(tmp_path / "first")
    assert (tmp_path / "first" / "a").read_text() == "fast" and (tmp_path / "model" / "a").read_text() == "slow"


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    """As a full disk, or a quota, in the middle of a write."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with whole_folder(tmp_path / "model", replace=True) as unfinished:
            fill(unfinished, "x" * 5000)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    assert os.waitstatus_to_exitcode(in_child(limited)) == 7
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "old").read_text() == "old"


def test_the_sentence_names_the_disk_where_it_is_full(tmp_path: Path) -> None:
    full = explain_disk("The grown model", tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert isinstance(full, RunFailed)
    assert str(full) == (
        f"The grown model could not be written to {tmp_path}: No space left on device; free space on its disk and run "
        f"the same command again."
    )
    assert "; mend that and" in str(explain_disk("It", tmp_path, PermissionError(13, "Permission denied")))
