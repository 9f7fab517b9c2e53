"""The layout of a checkpoint on disk.

    checkpoints/step-300/
        manifest.json           name, size and sha256 of every other file; written last
        state.json              step, parameters, and whatever the run wants back (position, ledger, ...)
        pieces.safetensors      which elements of which parameter lie in which rank's file (checkpoint/index.py)
        rank-00000.safetensors  the fp32 masters and moments that this rank alone was responsible for
        rank-00000.json         this rank's random number generators

A tensor in a safetensors file is a piece of a flattened parameter, [N] float32, and its key says which:
`exp_avg/blocks.3.attention.out.weight/0-4096`. Nothing depends on ranks or ZeRO stages. There is no pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

from ds_stacking.growth.state import KINDS, Kind, TensorSlice

FORMAT = "ds-stacking checkpoint"
VERSION = 2
READABLE = (1, 2)
"""Version 1 has no pieces.safetensors."""
MANIFEST, STATE, INDEX = "manifest.json", "state.json", "pieces.safetensors"
TEMPORARY = ".tmp-"
"""Begins the name of every directory that is not published yet, or no longer."""

CHECKPOINT_NAME = re.compile(r"step-([0-9]{1,18})(?:-([0-9]{1,18}))?")
"""`step-300`, or `step-300-2` where an earlier checkpoint of the same step stands already."""
FILE_NAME = re.compile(r"state\.json|pieces\.safetensors|rank-[0-9]{5}\.(?:json|safetensors)")
MOST_RANKS = 10**5
"""Ranks that these names can tell apart."""


def tensors_file(rank: int) -> str:
    """Name of the file that holds a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Name of the file that holds a rank's generators."""
    return f"rank-{rank:05d}.json"


def tensor_key(piece: TensorSlice, kind: Kind) -> str:
    """The piece's key in a safetensors file."""
    return f"{kind}/{piece.name}/{piece.start}-{piece.stop}"


def parse_key(key: str) -> tuple[TensorSlice, Kind]:
    """The inverse of `tensor_key`; raises ValueError for any other text."""
    kind, rest = key.split("/", 1)
    name, span = rest.rsplit("/", 1)
    start, stop = span.split("-")
    return TensorSlice(name, int(start), int(stop)), KINDS[KINDS.index(cast(Kind, kind))]


class PieceFile:
    """Where each tensor lies in one safetensors file: all masters first, then each of the moments.

    The header is made here, because the bytes are then written, or filled in any order, without a second copy.
    """

    def __init__(self, pieces: Sequence[TensorSlice]) -> None:
        self.pieces = list(pieces)
        ends = list(accumulate((piece.numel for piece in self.pieces), initial=0))
        self.numel = ends.pop()
        """Elements of one kind."""
        self._starts = dict(zip(self.pieces, ends, strict=True))
        self.header = self._header()
        self.nbytes = len(self.header) + 4 * len(KINDS) * self.numel

    def position(self, piece: TensorSlice, kind: Kind) -> int:
        """Index of the tensor's first element, counted in elements from the end of the header."""
        return KINDS.index(kind) * self.numel + self._starts[piece]

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for kind in KINDS:
            for piece in self.pieces:
                begin = 4 * self.position(piece, kind)
                offsets = [begin, begin + 4 * piece.numel]
                entries[tensor_key(piece, kind)] = {"dtype": "F32", "shape": [piece.numel], "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
