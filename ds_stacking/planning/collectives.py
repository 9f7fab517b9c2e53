"""What a step's collective calls send and wait for: which calls are made, and how NCCL would run them.

NCCL's own model (src/graph/tuning.cc, protocol Simple): a call costs BASE and a latency for each hop that the data
must take one after the other. Gathers and scatters are rings over all GPUs, whose hops grow with the GPUs. An
all-reduce is two such rings, or a chain in each node and a tree over the nodes up and down, whose hops grow with the
logarithm of the nodes: whichever waits less. Each sends what a ring sends. No NVLink SHARP, no SHARP in the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

BASE = 8.4e-6
"""Seconds of a call before its first hop."""
NVLINK = 100e9
"""Bytes/s each way from which a link between the GPUs of a node is NVLink or its like, and not PCIe."""
RING_HOPS, TREE_HOPS = (3.4e-6, 5.7e-6, 14e-6), (4e-6, 4e-6, 14e-6)
"""Seconds of a hop by NVLink, by PCIe, and by the network between nodes."""
GROUPS = 2
"""Parameter groups, each reduced and gathered by calls of its own: decayed or not. A growth may add two."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind in a step."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    """As NCCL and MPI name them."""
    volume: float
    """Bytes of the whole tensors, all calls together."""
    calls: float


def all_gather(volume: float, calls: float) -> Collective:
    """All-gathers."""
    return Collective(kind="all-gather", volume=volume, calls=calls)


def calls_of_step(parameters: int, *, zero_stage: int, accumulation: int, bucket: int) -> list[Collective]:
    """The calls of one optimizer step in bf16, 2 bytes a weight.

    ZeRO 0, 1 and 2 all-reduce the gradients of a step group by group, 1 and 2 a bucket at a time though each GPU needs
    its part only, and then gather the weights (engine/optimizers.py). Stage 3, in DeepSpeed 0.19.8, scatters gradients
    and gathers weights for the forward and for the backward pass, for every micro-batch.
    """
    weights, buckets = 2.0 * parameters, math.ceil(parameters / bucket)
    if zero_stage == 0:
        return [Collective(kind="all-reduce", volume=weights, calls=GROUPS)]
    if zero_stage < 3:  # what is not decayed, norms and biases, is less than a bucket
        reduced = Collective(kind="all-reduce", volume=weights, calls=buckets + GROUPS - 1)
        return [reduced, all_gather(weights, GROUPS)]
    reduced = Collective(kind="reduce-scatter", volume=accumulation * weights, calls=accumulation * buckets)
    return [reduced, all_gather(2 * accumulation * weights, 2 * accumulation * buckets)]


def bytes_sent(collective: Collective, gpus: int) -> float:
    """By one GPU, all calls together."""
    times = 2 if collective.kind == "all-reduce" else 1
    return times * collective.volume * (gpus - 1) / gpus


def latency(kind: str, *, nodes: int, gpus_per_node: int, link: float) -> float:
    """Seconds that one call waits, whatever it sends; `link` is bytes/s between the GPUs of a node."""
    inside = 0 if link >= NVLINK else 1
    within, between = gpus_per_node * nodes - nodes, nodes - 1
    ring = within * RING_HOPS[inside] + between * RING_HOPS[2]
    if kind != "all-reduce":
        return BASE + ring
    tree = (gpus_per_node - 1) * TREE_HOPS[inside] + math.ceil(math.log2(nodes)) * TREE_HOPS[2]
    return BASE + 2 * min(ring, tree)
