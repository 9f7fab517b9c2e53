"""Work that takes ranks unequally long, and words of one rank for all; JSON bytes cross ranks, never pickle.

A collective call has a time limit, and storage may be slow without end. So whoever has work does it in a thread, and
all ranks meet once a second in a short reduction: no rank ever waits in a collective call for another one's work.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ds_stacking.common.errors import OtherRankFailed, UserError
from ds_stacking.growth.exchange import Exchange

MEET = 1.0
"""Seconds between two meetings."""
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[], Result],
    exchange: Exchange,
    *,
    progress: Callable[[], int] = lambda: 0,
    alive: Callable[[], None] = lambda: None,
) -> Result:
    """What `work()` returns on this rank, when all ranks are done; it must make no collective call itself.

    `progress()` is a number that grows while `work` gets on; wherever any rank's did, `alive()` is called on all. What
    `work` raises is raised here, and OtherRankFailed on the other ranks. All ranks call it together.
    """
    task = _Task(work)
    task.start()
    seen = 0
    while True:
        task.join(MEET)
        ended = not task.is_alive()
        at = torch.tensor([int(not ended), int(ended and task.error is not None), progress()])
        unfinished, failed, moved = exchange.all_reduce_tensor(at).tolist()
        if not unfinished:
            break
        if moved > seen:
            alive()
        seen = moved
    if task.error is not None:
        raise task.error
    if failed:
        raise OtherRankFailed(f"{failed} of {exchange.world_size} ranks failed where all wait for each other")
    return task.result


def from_first_rank(
    decide: Callable[[], Any],
    exchange: Exchange,
    *,
    progress: Callable[[], int] = lambda: 0,
    alive: Callable[[], None] = lambda: None,
) -> Any:
    """What `decide()` returns on rank 0, a plain JSON value, however long it takes. All ranks call it together.

    A UserError on rank 0 is raised on every rank. `progress` and `alive` are those of `side_by_side`.
    """

    def ask() -> bytes:
        if exchange.rank != 0:
            return b""
        try:
            return json.dumps({"value": decide()}).encode()
        except UserError as error:
            return json.dumps({"error": str(error)}).encode()

    message = side_by_side(ask, exchange, progress=progress, alive=alive)
    size = exchange.all_reduce_sum(len(message))
    whole = [torch.frombuffer(bytearray(message), dtype=torch.uint8)] if exchange.rank == 0 else []
    sizes = [size] + [0] * (exchange.world_size - 1)
    received = exchange.all_to_all([whole] * exchange.world_size, sizes, dtype=torch.uint8)[0]
    answer = json.loads(received.cpu().numpy().tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


class _Task(threading.Thread):
    """A call in a thread that does not keep its process from ending."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="side by side", daemon=True)
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
