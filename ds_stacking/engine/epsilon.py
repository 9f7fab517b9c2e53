"""Adam's epsilon as fairseq 0.6 adds it, before the bias correction, in optimizers that add it behind.

fairseq 0.6 divides by sqrt(v) + eps and multiplies the rate by sqrt(1 - beta2^t) / (1 - beta1^t); PyTorch and
DeepSpeed divide by sqrt(v / (1 - beta2^t)) + eps. The two are the same where step t of the latter has
eps / sqrt(1 - beta2^t). All of them read "eps" of a parameter group at each step. A group has one step count, which is
kept in it beside the one that the optimizer keeps with its moments: on the device, where to read it would make every
step wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

EPS, UPDATES = "uncorrected_eps", "updates"
"""Keys of a parameter group with such an epsilon: its value, and Adam's step count."""


def uncorrected_epsilon(eps: float) -> dict[str, Any]:
    """Options of a parameter group of a new optimizer that give it such an epsilon."""
    return {EPS: eps, UPDATES: 0}


def set_epsilon(groups: Iterable[dict[str, Any]]) -> None:
    """Give the groups that have such an epsilon the value that their next update needs."""
    for group in groups:
        if EPS in group:
            group["eps"] = group[EPS] / math.sqrt(1 - group["betas"][1] ** (group[UPDATES] + 1))


def count_update(groups: Iterable[dict[str, Any]]) -> None:
    """An update was made."""
    for group in groups:
        if EPS in group:
            group[UPDATES] += 1


def set_count(group: dict[str, Any], step: int) -> None:
    """The optimizer's own count of the group's steps was set."""
    if EPS in group:
        group[UPDATES] = step
