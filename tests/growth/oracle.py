"""Growth of full tensors in dictionaries: what every sharded growth must equal to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, dict[str, Tensor]]
"""Kind -> name -> full tensor, flat."""

FACTORS = {
    "stack": {"original": (1, 1), "copy": (1, 1)},
    "new_reset": {"original": (1, 1), "copy": (0, 0)},
    "reset": {"original": (0, 0), "copy": (0, 0)},
    "second_only": {"original": (1, 1), "copy": (0, 1)},
    "scale:0.3": {"original": (1, 1), "copy": (0.3, 0.3**2)},
}
"""What each policy multiplies exp_avg and exp_avg_sq by."""


def grow_by_hand(state: State, steps: Mapping[str, int], layers: Sequence[int], policy: str) -> tuple[State, dict]:
    """The state of `blocks.<i>.*` and all else, grown by the layer map `layers`, and its step counts."""
    grown: State = {kind: {} for kind in state}
    grown_steps = {}

    def put(target: str, source: str, who: str) -> None:
        first, second = FACTORS[policy][who]
        for kind, factor in (("master", 1), ("exp_avg", first), ("exp_avg_sq", second)):
            values = state[kind][source]
            grown[kind][target] = values * factor if factor else torch.zeros_like(values)
        grown_steps[target] = steps[source] if second else 0

    for name in state["master"]:
        if not name.startswith("blocks."):
            put(name, name, "original")
            continue
        _, index, rest = name.split(".", 2)
        for position, source in enumerate(layers):
            if source == int(index):
                put(f"blocks.{position}.{rest}", name, "copy" if source in layers[:position] else "original")
    return grown, grown_steps


def differing(found: State, expected: State) -> list[str]:
    """Names of tensors that are missing, too many or differ in a bit."""
    wrong = []
    for kind, tensors in expected.items():
        wrong += [f"{name} ({kind})" for name in found[kind].keys() ^ tensors.keys()]
        for name in found[kind].keys() & tensors.keys():
            if not torch.equal(found[kind][name].view(torch.int32), tensors[name].view(torch.int32)):
                wrong.append(f"{name} ({kind})")
    return wrong
