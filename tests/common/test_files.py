"""Every file is whole or absent, whenever the writer is killed; nothing is left where it failed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ds_stacking.common.files import is_leftover, whole_file, write_json, write_text

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
