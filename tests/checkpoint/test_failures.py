"""A disk that is full, slow or forbidden: training is told and goes on, and what was valid stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from ds_stacking.checkpoint import durable, job
from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.checkpoint.job import SaveJob
from ds_stacking.checkpoint.manifest import read_manifest
from ds_stacking.checkpoint.select import newest_valid
from ds_stacking.checkpoint.write import CheckpointWriter, SaveReport
from ds_stacking.common.errors import UserError
from ds_stacking.growth.exchange import Exchange, OneRank
from ds_stacking.growth.state import FullState, Kind, TensorSlice
from tests.checkpoint.stores import IDENTITY, NUMELS, PARAMETERS, equal, random_state, save, stored
from tests.growth.simulated import run_threads


def writer(folder: Path, exchange: Exchange | None = None, **options) -> CheckpointWriter:
    return CheckpointWriter(folder, exchange or OneRank(), identity=IDENTITY, **{"patience": 10.0} | options)


def attempt(made: CheckpointWriter, step: int, **options) -> SaveReport:
    """Save and wait; the report."""
    made.save(step, random_state(step), PARAMETERS, extra={}, **options)
    succeeded = made.wait()
    (report,) = made.reports()
    assert succeeded == (report.error is None) or made.exchange.world_size > 1
    return report


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB: a few checkpoints of the test's size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(small_disk, monkeypatch, foreseen) -> None:
    usage = shutil.disk_usage
    if not foreseen:  # space that is there when the save begins and is gone when it writes
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(folder)._replace(free=1 << 40))
    made = writer(small_disk / "checkpoints", keep=1)
    assert attempt(made, 1).error is None
    (small_disk / "ballast").write_bytes(bytes(usage(small_disk).free - 4096))
    report = attempt(made, 2)
    assert "No space left on device" in report.line and "training goes on" in report.line
    assert newest_valid(made.folder, IDENTITY).step == 1
    assert [path.name for path in made.folder.iterdir()] == ["step-1"]
    (small_disk / "ballast").unlink()
    assert attempt(made, 3).error is None
    assert newest_valid(made.folder, IDENTITY).step == 3


@pytest.mark.parametrize("where", ["write_file", "publish"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_error_of_the_disk_is_raised(tmp_path, monkeypatch, where, asynchronous) -> None:
    made = writer(tmp_path, asynchronous=asynchronous)
    assert attempt(made, 1).error is None
    with monkeypatch.context() as patch:
        patch.setattr(job, where, full_disk)
        assert attempt(made, 2).error == "No space left on device"
    assert newest_valid(tmp_path, IDENTITY).step == 1
    assert attempt(made, 3).error is None and newest_valid(tmp_path, IDENTITY).step == 3


def test_a_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    report = attempt(writer(tmp_path / "file" / "checkpoints"), 1)
    assert "Not a directory" in report.error and str(tmp_path) in report.error


def test_rank_zero_tells_what_went_wrong_on_another(tmp_path, monkeypatch) -> None:
    original = job.write_file

    def fails_on_rank_1(path: Path, parts: list) -> durable.FileRecord:
        if path.name == "rank-00001.json":
            full_disk()
        return original(path, parts)

    run_threads(2, lambda exchange: save(tmp_path, 1, exchange=exchange))
    monkeypatch.setattr(job, "write_file", fails_on_rank_1)
    reports = run_threads(2, lambda exchange: attempt(writer(tmp_path, exchange), 2))
    assert reports[0].error == "rank 1: No space left on device" and reports[1].error == "No space left on device"
    assert newest_valid(tmp_path, IDENTITY).step == 1


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(tmp_path, monkeypatch) -> None:
    original = SaveJob.write_share
    monkeypatch.setattr(SaveJob, "write_share", lambda job, v: original(job, v) if job.rank == 0 else None)
    reports = run_threads(2, lambda exchange: attempt(writer(tmp_path, exchange, patience=0.2), 1))
    assert "rank 1 had not written its share" in reports[0].error
    assert newest_valid(tmp_path) is None


def test_marks_are_gathered_by_listings_not_by_a_look_up_per_rank(tmp_path, monkeypatch) -> None:
    """Every second rank is there at the first look, the others at the third."""
    ranks = [
        SaveJob(folder=tmp_path, attempt=1, rank=rank, world_size=40, step=1, keep=False, identity={}, state=b"{}",
                generators=b"{}", file=PieceFile([]), names=[], patience=10.0)
        for rank in range(40)
    ]  # fmt: skip
    for one in ranks[::2]:
        one.write_share(torch.empty(0))
    late, calls = ranks[1::2], {"listdir": 0, "stat": 0}
    listdir, stat = os.listdir, os.stat

    def counted_listdir(path: Path) -> list[str]:
        calls["listdir"] += path == ranks[0].temporary
        if calls["listdir"] == 3:
            while late:
                late.pop().write_share(torch.empty(0))
        return listdir(path)

    def counted_stat(*args: object, **options: object) -> os.stat_result:
        calls["stat"] += Path(args[0]).name.startswith(".rank-")
        return stat(*args, **options)

    monkeypatch.setattr(os, "listdir", counted_listdir)
    monkeypatch.setattr(os, "stat", counted_stat)
    files = read_manifest(ranks[0].publish()).files
    assert len(files) == 2 * 40 + 2 and calls == {"listdir": 3, "stat": 0}


def test_a_slow_write_makes_the_next_save_be_skipped(tmp_path, monkeypatch) -> None:
    """All ranks skip together, also those that are done; what must be saved waits instead."""
    release, original = threading.Event(), SaveJob.write_share

    def slow(job: SaveJob, values) -> None:
        if job.rank == 0 and job.step == 1:
            assert release.wait(20)
        original(job, values)

    monkeypatch.setattr(SaveJob, "write_share", slow)

    def case(exchange: Exchange) -> list[SaveReport]:
        made = writer(tmp_path, exchange)
        made.save(1, random_state(1), PARAMETERS, extra={})
        assert made.close(5.0 if exchange.rank else 0.0) == (exchange.rank == 1), "rank 0 alone is still writing"
        made.save(2, random_state(2), PARAMETERS, extra={})
        release.set()
        made.save(3, random_state(3), PARAMETERS, extra={}, required=True)
        assert made.wait()
        return made.reports()

    for reports in run_threads(2, case):
        errors = {report.step: report.error for report in reports}
        assert errors == {1: None, 2: "the save before it is still being written", 3: None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]
    assert equal(stored(tmp_path / "step-1"), random_state(1)) and equal(stored(tmp_path / "step-3"), random_state(3))


def test_memory_that_is_not_there(tmp_path) -> None:
    class Unreadable(FullState):
        def read(self, piece: TensorSlice, kind: Kind) -> torch.Tensor:
            raise MemoryError("cannot allocate")

    def case(exchange: Exchange) -> SaveReport:
        made = writer(tmp_path, exchange)
        made.save(1, Unreadable(NUMELS) if exchange.rank else random_state(1), PARAMETERS, extra={})
        made.wait()
        return made.reports()[0]

    reports = run_threads(2, case)
    assert reports[0].error == "rank 1: cannot allocate" and reports[1].error == "cannot allocate"
    alone = writer(tmp_path)
    alone.save(2, Unreadable(NUMELS), PARAMETERS, extra={})
    assert not alone.wait() and alone.reports()[0].error == "cannot allocate"


def test_older_ones_that_cannot_be_deleted_do_not_spoil_the_new_one(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    made = writer(tmp_path, keep=1)
    monkeypatch.setattr("ds_stacking.checkpoint.retention.remove_checkpoint", full_disk)
    report = attempt(made, 2)
    assert report.path == tmp_path / "step-2" and "could not be deleted: No space left" in report.line


def test_rubbish_goes_before_the_next_save_takes_its_space(tmp_path, monkeypatch) -> None:
    made = writer(tmp_path)
    (tmp_path / ".tmp-step-7-abc" / "deep").mkdir(parents=True)
    original = SaveJob.write_share

    def look_and_write(job: SaveJob, values) -> None:
        assert list(tmp_path.iterdir()) == []
        original(job, values)

    monkeypatch.setattr(SaveJob, "write_share", look_and_write)
    assert attempt(made, 1).error is None


def test_at_least_one_is_kept(tmp_path) -> None:
    with pytest.raises(UserError, match="keep is 0"):
        writer(tmp_path, keep=0)
