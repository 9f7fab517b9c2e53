"""The same data everywhere: each node prepares or opens them by itself, and no loss tells when one has others."""

from __future__ import annotations

import socket
from collections import defaultdict

import torch
import torch.distributed as dist

from ds_stacking.common.errors import UserError

DIGEST, HOST = 8, 64
"""Bytes that a rank sends: of its data's fingerprint and of its host's name."""
SHOWN = 8
"""Hosts that a message names."""


def check_same_data(fingerprint: str, source: str, device: torch.device) -> None:
    """Raise UserError on every rank where not all have the data of this `fingerprint`. All ranks call it together."""
    mine = bytes.fromhex(fingerprint) + socket.gethostname().encode()[:HOST].ljust(HOST)
    sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    every = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(every, sent)
    hosts: dict[bytes, dict[str, None]] = defaultdict(dict)  # an ordered set of hosts for each digest
    for row in torch.stack(every).cpu():
        content = row.numpy().tobytes()
        hosts[content[:DIGEST]][content[DIGEST:].decode(errors="replace").strip()] = None
    if len(hosts) > 1:
        versions = ", ".join(f"{digest.hex()} on {_names(list(names))}" for digest, names in hosts.items())
        raise UserError(
            f"The nodes prepared different data from {source}: {versions}; let them share one cache "
            f"(--corpus.cache_dir), or give all the same files and the same versions of the packages."
        )


def _names(hosts: list[str]) -> str:
    more = len(hosts) - SHOWN
    return ", ".join(hosts[:SHOWN]) + (f" and {more} more" if more > 0 else "")
