"""One rank fails, all ranks end, within seconds and also where they wait in a collective call that never returns.

The failing rank leaves a word in the process group's store, and a thread of every rank looks there once a second, as
NCCL's own monitor does. Signals would not do: Python handles them when a call returns, and a wait for a dead partner
does not.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ds_stacking.common.environment import local_rank
from ds_stacking.common.errors import OtherRankFailed, RunAgain
from ds_stacking.common.failures import LOST, exit_code, follows_a_loss
from ds_stacking.common.streams import last_words

LOOK = 1.0
"""Seconds between two looks."""
GRACE = 5.0
"""Seconds from the alarm in which a rank may end by itself, with its own words."""
_numbers = itertools.count()


class Alarm:
    """Watches, inside a `with`, for the failure of another rank and tells the others of this one's.

    A call that fails because that rank is gone leaves the `with` as OtherRankFailed, in the other's words.
    """

    def __init__(self) -> None:
        self.undo: Callable[[], None] = lambda: None
        """Called before the process is ended from here; the body of the `with` may set it."""

    def __enter__(self) -> Alarm:
        self._closed, self._heard = threading.Event(), ""
        self._word = (
            f"failed/{next(_numbers)}"  # all ranks count alike; an earlier run of this process may have failed
        )
        store: Any = dist.distributed_c10d._get_default_store()  # torch's stubs do not know clone()
        self._store: dist.Store = store.clone()  # a connection that no other thread uses
        if dist.get_world_size() > 1:
            threading.Thread(target=self._watch, name="alarm", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.sound(error)
        self.close()
        if error is not None and self._heard and follows_a_loss(error):
            raise OtherRankFailed(self._heard) from error

    def close(self) -> None:
        """Watch no longer: this rank ends by itself."""
        self._closed.set()

    def sound(self, error: BaseException) -> None:
        """Tell all ranks that this one ends by `error`; to be asked to stop is no failure."""
        first = not self._closed.is_set()
        self.close()
        if isinstance(error, RunAgain) or not first or dist.get_world_size() == 1:
            return
        words = str(error).partition("\n")[0]
        why = f"rank {dist.get_rank()} failed ({f'{type(error).__name__}: {words}'.rstrip(': ')})"
        try:
            self._store.compare_set(self._word, "", json.dumps({"why": why, "code": exit_code(error)}))
        except RuntimeError:
            return  # the store went with rank 0, and so all others know already
        if dist.get_rank() == 0:
            time.sleep(2 * LOOK)  # the store ends with this process, and the others shall read it before

    def _watch(self) -> None:
        while not self._closed.wait(LOOK):
            try:
                if not self._store.check([self._word]):
                    continue
                failure, speaks = json.loads(self._store.get(self._word)), local_rank() == 0
            except RuntimeError:
                failure, speaks = {"why": "rank 0 is gone", "code": LOST}, True
            self._heard = f"{failure['why'].rstrip('.')}."
            if not self._closed.wait(GRACE):
                if speaks:
                    last_words(f"error: {failure['why']}; rank {dist.get_rank()} ends.")
                with suppress(Exception):
                    self.undo()
                os._exit(failure["code"])
