"""One rank decides, the others are told: JSON bytes cross ranks, never pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ds_stacking.config import UserError
from ds_stacking.growth.exchange import Exchange


def from_first_rank(decide: Callable[[], Any], exchange: Exchange) -> Any:
    """What `decide()` returns on rank 0, a plain JSON value. All ranks call it together.

    A UserError on rank 0 is raised on every rank.
    """
    message = b""
    if exchange.rank == 0:
        try:
            message = json.dumps({"value": decide()}).encode()
        except UserError as error:
            message = json.dumps({"error": str(error)}).encode()
    size = exchange.total(len(message))
    whole = [torch.frombuffer(bytearray(message), dtype=torch.uint8)] if exchange.rank == 0 else []
    sizes = [size] + [0] * (exchange.world_size - 1)
    received = exchange.swap([whole] * exchange.world_size, sizes, dtype=torch.uint8)[0]
    answer = json.loads(received.cpu().numpy().tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]
