"""SIGKILL at named points of a save: the checkpoint before is still there, or the new one already is."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.checkpoint import durable, job, retention, write
from ds_stacking.checkpoint.job import SaveJob
from ds_stacking.checkpoint.select import newest_valid, published
from ds_stacking.checkpoint.verify import verify
from tests.checkpoint.stores import IDENTITY, equal, random_state, save, stored


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str) -> Callable[[], None]:
    """Die instead of calling `owner.name`."""
    return lambda: setattr(owner, name, die)


def after(owner: Any, name: str) -> Callable[[], None]:
    """Die when `owner.name` has returned."""

    def arm() -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: die(original(*args, **kwargs)))

    return arm


def inside(file_name: str) -> Callable[[], None]:
    """Die when half of a file's bytes are written."""

    def arm() -> None:
        original = job.write_file

        def half(path: Path, parts: list) -> Any:
            if path.name == file_name:
                whole = b"".join(bytes(part) for part in parts)
                path.write_bytes(whole[: len(whole) // 2])
                die()
            return original(path, parts)

        job.write_file = half

    return arm


def inside_the_pruning() -> None:
    """Die when one file of a doomed checkpoint is gone."""

    def half(path: Path, **_: Any) -> None:
        for file in path.glob("*"):
            file.unlink()
            die()

    durable.shutil.rmtree = half


POINTS = {
    "before the save": (before(durable, "make_directory"), 1),
    "inside the tensors": (inside("rank-00000.safetensors"), 1),
    "after the tensors": (before(job, "sync_directory"), 1),
    "inside state.json": (inside("state.json"), 1),
    "before the mark": (before(SaveJob, "_mark"), 1),
    "after the mark": (after(SaveJob, "_mark"), 1),
    "before the manifest": (before(job, "publish"), 1),
    "inside the manifest": (inside("manifest.json"), 1),
    "before the rename": (before(job, "_free_name"), 1),
    "after the rename": (after(SaveJob, "publish"), 2),
    "before the pruning": (before(write, "prune"), 2),
    "inside the pruning": (inside_the_pruning, 2),
    "after the pruning": (after(retention, "remove_checkpoint"), 2),
}


def save_and_die(folder: Path, point: str, asynchronous: bool) -> None:
    POINTS[point][0]()
    save(folder, 2, keep=1, asynchronous=asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_loses_nothing_that_was_valid(tmp_path, point, asynchronous) -> None:
    save(tmp_path, 1)
    arguments = (tmp_path, point, asynchronous)
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=arguments)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL, "the fault did not happen"
    found = newest_valid(tmp_path, IDENTITY)
    assert found.step == POINTS[point][1] and found.notes == ()
    assert equal(stored(found.path), random_state(found.step))
    for path, _ in published(tmp_path):
        verify(path)
    save(tmp_path, 3)
    assert newest_valid(tmp_path, IDENTITY).step == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")], "rubbish stays behind"
