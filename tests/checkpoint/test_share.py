"""Slow storage and the time limit of collective calls, scaled down together: nobody waits in one for another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_stacking.checkpoint import verify
from ds_stacking.checkpoint.durable import file_sha256
from ds_stacking.checkpoint.manifest import read_manifest
from ds_stacking.checkpoint.select import find_together, newest_valid, share_out_files
from ds_stacking.checkpoint.share import side_by_side
from ds_stacking.common.errors import OtherRankFailed
from ds_stacking.engine.factory import device, init_distributed
from ds_stacking.growth.exchange import make_exchange
from tests.checkpoint.stores import IDENTITY, Shard, random_state, save
from tests.engine.tiny import replaced
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LIMIT, ALONE = 2.0, 10.0
"""Seconds: the limit of a collective call, and of one rank that reads a checkpoint alone (84 GB at 140 MB/s: 600)."""


def slow_storage(folder: Path) -> Callable[..., str]:
    """`file_sha256` on storage that gives each rank so many bytes a second."""
    rate = sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json") / ALONE
    turn = threading.Lock()

    def slow(path: Path, count: Callable[[int], None] = lambda size: None) -> str:
        for _ in range(20):
            with turn:
                time.sleep(path.stat().st_size / 20 / rate)
            count(path.stat().st_size // 20)
        return file_sha256(path)

    return slow


def resume(folder: str, old: bool) -> tuple[float, int]:
    """Seconds to find a checkpoint, the newest but one, and signs of life meanwhile."""
    signs: list[int] = []
    exchange = make_exchange(device())
    state = Shard(random_state(1), exchange.rank, exchange.world_size)
    for step in (1, 2):
        save(Path(folder), step, state, exchange)
    files = read_manifest(Path(folder) / "step-2").files
    damaged = list(files)[share_out_files([record.size for record in files.values()], 2)[1][0]]
    if exchange.rank == 0:  # the newest is damaged, in a file that is rank 1's to read
        file = Path(folder) / "step-2" / damaged
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    init_distributed(limit=timedelta(seconds=LIMIT))
    begin = time.monotonic()
    with replaced(verify, "file_sha256", slow_storage(Path(folder) / "step-1")):
        if not old:
            found = find_together(Path(folder), exchange, identity=IDENTITY, alive=lambda: signs.append(1))
            assert found is not None and found.step == 1 and f"{damaged} was changed" in found.notes[0]
            return time.monotonic() - begin, len(signs)
        if exchange.rank == 0:  # as it was: one rank reads while the others wait in a collective call
            newest_valid(Path(folder), IDENTITY)
        exchange.all_reduce_sum(1)
    return time.monotonic() - begin, 0


def test_a_resume_takes_longer_than_a_collective_call_may(tmp_path: Path) -> None:
    for seconds, signs in run_ranks(2, resume, str(tmp_path), False):
        assert 2 * LIMIT < seconds < 2 * ALONE and signs > 4, "two checkpoints, each shared by two ranks"


def test_one_rank_that_reads_alone_would_end_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?i)timed out|timeout"):
        run_ranks(2, resume, str(tmp_path), True)


def first_rank_alone(fails: bool) -> str:
    """Rank 0 works longer than the limit, as in an export."""
    init_distributed(limit=timedelta(seconds=LIMIT))

    def work() -> str:
        if dist.get_rank() == 0:
            time.sleep(2 * LIMIT)
            if fails:
                raise OSError("no space")
        return "done"

    try:
        return side_by_side(work, make_exchange(device()))
    except (OSError, OtherRankFailed) as error:
        return repr(error)


def test_the_others_wait_for_the_first_rank_outside_collective_calls() -> None:
    assert run_ranks(2, first_rank_alone, False) == ["done", "done"]
    failed = run_ranks(2, first_rank_alone, True)
    assert failed[0] == "OSError('no space')" and failed[1].startswith("OtherRankFailed('1 of 2 ranks failed")


def test_every_file_is_read_once_and_the_work_is_even() -> None:
    sizes = [5, 90, 10, 10, 40, 30, 20, 90]
    taken = share_out_files(sizes, 3)
    assert sorted(index for mine in taken for index in mine) == list(range(8))
    assert max(sum(sizes[index] for index in mine) for mine in taken) <= 100
    two = share_out_files([7, 7], 8)
    assert [bool(mine) for mine in two] == [True, False, False, False] * 2, "spread over the nodes"
    assert share_out_files([], 2) == [[], []]
