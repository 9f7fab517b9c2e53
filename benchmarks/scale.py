"""What 8 to 1,024 ranks cost before and beside the data itself: planning of growth and restore, files of a checkpoint.

    python -m benchmarks.scale
    python -m benchmarks.scale --ranks 1024 --models 7b

One process stands in for each of some ranks in turn (`simulated_ranks`, spread evenly) and plans what that rank would
do, by the code that runs in training; the tables of the others, which a real rank gathers, are computed. No tensor has
data. Prints one JSON line per case; the figures are those of the rank for which they are largest. `plan_seconds` (of a
processor, one thread) and `plan_bytes` (growth of the process's memory) are for the whole planning. `table_bytes` is
what a rank receives of the others' tables, `sent_bytes` and `received_bytes` what it then sends and receives of the
state, in `rounds` with `messages` to others. `files`, and the operations of a save and of a restore, are of a small
checkpoint really written and read, all ranks together: what a parallel file system's metadata servers see, hashing
apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_stacking.checkpoint.format import PieceFile
from ds_stacking.checkpoint.job import SaveJob
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.generators import capture_generators
from ds_stacking.config import ModelConfig
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.growth.exchange import Exchange
from ds_stacking.growth.operators import layer_map
from ds_stacking.growth.plan import GrowthPlan, ParameterInfo, copy_plan, make_plan, parameter_groups
from ds_stacking.growth.schedule import Move, round_limit, rounds, schedule
from ds_stacking.growth.state import KINDS, TensorSlice
from ds_stacking.models.convert import parameter_shapes

MODELS = {
    "bert_base": (ModelConfig(hidden_size=768, num_heads=12, vocab_size=30528), 12),
    "bert_large": (ModelConfig(hidden_size=1024, num_heads=16, vocab_size=30528), 24),
    "7b": (ModelConfig(hidden_size=4096, num_heads=32, vocab_size=50304), 34),
}
"""Configuration and depth; a growth doubles the depth to get there."""
SAMPLE = 16
"""Ranks that are simulated at most."""
ELEMENT = 4 * len(KINDS)
"""Bytes of an element's state."""


class SimulatedRank(Exchange):
    """One rank's end of the exchange, where what the other ranks say is known beforehand."""

    def __init__(self, rank: int, world_size: int, tables: Sequence[Tensor]) -> None:
        self.rank, self.world_size = rank, world_size
        self._tables = iter(tables)
        self.load = torch.zeros(1, 2, dtype=torch.int64)

    def gather_slices(self, rows: Tensor) -> Tensor:
        """The tables of all ranks, in the order in which they are asked for."""
        return next(self._tables)

    def all_reduce_tensor(self, values: Tensor) -> Tensor:
        """The only sum that planning asks for: what every rank sends and receives."""
        return self.load


def zero_table(parameters: Mapping[str, ParameterInfo], zero_stage: int, world_size: int) -> Tensor:
    """What all ranks hold: [N, 4] int64 rows of (rank, number of the parameter, start, stop), by rank."""
    number = {name: at for at, name in enumerate(parameters)}
    if zero_stage == 3:
        parts = [(number[name], info.numel, -(-info.numel // world_size)) for name, info in parameters.items()]
        numbers, numels, sizes = torch.tensor(parts).T[:, :, None]  # each [M, 1]
        ranks = torch.arange(world_size)
        starts = (ranks * sizes).minimum(numels)
        stops = (starts + sizes).minimum(numels)
        rows = torch.stack([ranks.expand_as(starts), numbers.expand_as(starts), starts, stops], 2).view(-1, 4)
    else:
        groups = [
            _flat_group(torch.tensor([(number[name], parameters[name].numel) for name in names]), world_size)
            for _, names in parameter_groups(parameters)
        ]
        rows = torch.cat(groups)
    rows = rows[rows[:, 2] < rows[:, 3]]
    return rows[torch.argsort(rows[:, 0], stable=True)]


def _flat_group(group: Tensor, world_size: int) -> Tensor:
    """Parameters (number, elements) [M, 2] one after another, padded as DeepSpeed pads and cut into equal parts."""
    ends = group[:, 1].cumsum(0)
    begins = ends - group[:, 1]
    size = -(-int(ends[-1]) // (2 * world_size)) * 2
    bounds = torch.cat([begins, ends[-1:], size * torch.arange(world_size)]).unique()
    bounds = bounds[bounds <= ends[-1]]
    at = torch.searchsorted(ends, bounds[:-1], right=True)
    columns = [bounds[:-1] // size, group[at, 0], bounds[:-1] - begins[at], bounds[1:] - begins[at]]
    return torch.stack(columns, 1)


def whole_table(parameters: Mapping[str, ParameterInfo], world_size: int) -> Tensor:
    """What all ranks hold of a checkpoint: everything."""
    wholes = torch.tensor([(number, 0, info.numel) for number, info in enumerate(parameters.values())])
    ranks = torch.arange(world_size).repeat_interleave(len(wholes))
    return torch.cat([ranks[:, None], wholes.repeat(world_size, 1)], 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan, and what all ranks hold and want."""

    plan: GrowthPlan
    held: Tensor
    wanted: Tensor
    world_size: int

    def slices(self, table: Tensor, rank: int, names: Sequence[str]) -> list[TensorSlice]:
        """One rank's rows of a table."""
        return [TensorSlice(names[number], *span) for _, number, *span in table[table[:, 0] == rank].tolist()]

    def moves(self, rank: int) -> tuple[list[Move], SimulatedRank]:
        """What the rank plans to do."""
        exchange = SimulatedRank(rank, self.world_size, [self.held, self.wanted])
        sources = list(dict.fromkeys(e.source for e in self.plan.entries if e.source is not None))
        held = self.slices(self.held, rank, sources)
        wanted = self.slices(self.wanted, rank, [entry.target for entry in self.plan.entries])
        return schedule(self.plan, held, wanted, exchange), exchange


def make_case(name: str, model: str, world_size: int, zero_stage: int) -> Case:
    """`growth` from half the depth, or `restore` of the full depth from a checkpoint."""
    config, layers = MODELS[model]
    shapes = parameter_shapes(config, layers // 2 if name == "growth" else layers)
    parameters = {n: ParameterInfo(numel=math.prod(s), decay=len(s) > 1, step=10) for n, s in shapes.items()}
    blocks = find_block_names(shapes)
    if name == "growth":
        layer_by_layer = layer_map("stack", layers // 2, layers)
        plan = make_plan(parameters, blocks, layer_by_layer, operator="stack", optimizer_state="stack", stage=1)
        held = zero_table(parameters, zero_stage, world_size)
    else:
        plan = copy_plan(parameters, blocks)
        held = whole_table(parameters, world_size)
    wanted = zero_table(plan.parameters, zero_stage, world_size)
    return Case(plan=plan, held=held, wanted=wanted, world_size=world_size)


@dataclass(kw_only=True)
class Figures:
    """The largest over the simulated ranks."""

    plan_seconds: float = 0.0
    plan_bytes: int = 0
    table_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    copied_bytes: int = 0
    rounds: int = 0
    messages: int = 0
    moves: int = 0
    largest_round_bytes: int = 0
    """Most that a rank sends or receives at a time."""
    checkpoint: dict[str, Any] = field(default_factory=dict)

    def raise_to(self, **values: float) -> None:
        """Keep the larger of what stands here and `values`."""
        for name, value in values.items():
            setattr(self, name, max(getattr(self, name), value))


def plan_case(case: Case, sample: Sequence[int]) -> Figures:
    """Plan on every rank of `sample`."""
    figures = Figures(table_bytes=8 * 3 * (len(case.held) + len(case.wanted)))
    planned: dict[int, tuple[list[Move], SimulatedRank, float]] = {}
    load = torch.zeros(case.world_size, 2, dtype=torch.int64)
    for rank in sample:
        with peak_memory() as peak:
            start = time.process_time()
            moves, exchange = case.moves(rank)
            seconds = time.process_time() - start
        crossing = [move for move in moves if move.crosses]
        load[rank, 0] = sum(move.numel for move in crossing if move.src_rank == rank)
        load[rank, 1] = sum(move.numel for move in crossing if move.dst_rank == rank)
        copied = sum(move.numel for move in moves if not move.crosses)
        figures.raise_to(plan_bytes=peak[0], moves=len(moves), copied_bytes=ELEMENT * copied)
        planned[rank] = crossing, exchange, seconds
    for rank, (crossing, exchange, seconds) in planned.items():
        exchange.load = load
        start = time.process_time()
        parts = rounds(crossing, round_limit(case.plan), exchange)
        figures.raise_to(plan_seconds=seconds + time.process_time() - start, rounds=len(parts))
        sent = [[move for move in part if move.src_rank == rank] for part in parts]
        received = [[move for move in part if move.dst_rank == rank] for part in parts]
        largest = max((sum(move.numel for move in part) for part in sent + received), default=0)
        figures.raise_to(
            sent_bytes=ELEMENT * int(load[rank, 0]),
            received_bytes=ELEMENT * int(load[rank, 1]),
            messages=sum(len({move.dst_rank for move in part}) for part in sent),
            largest_round_bytes=ELEMENT * largest,
        )
    return figures


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory grew inside, at most: the list's one item."""
    grown = [0]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield grown
    grown[0] = _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


COUNTED = {"open": "opens", "os.listdir": "listings", "os.scandir": "listings"}
COUNTED |= dict.fromkeys(("os.mkdir", "os.rename", "os.remove", "os.rmdir"), "changes")
_counts: Counter[str] | None = None
_opened: object = None
"""The path of the last open()."""


def _note(event: str, values: tuple) -> None:
    if _counts is None or event not in COUNTED:
        return
    global _opened
    if event == "open":
        path, mode, _ = values
        if isinstance(path, int) or (mode is None and path == _opened):
            return  # a file that is open already, or the opener of an open() that was counted
        _opened = path
    _counts[COUNTED[event]] += 1


@contextmanager
def operations() -> Iterator[Counter[str]]:
    """Counts the calls that reach a file system's metadata: opens, listings, changes of names, and look-ups (stat)."""
    global _counts
    unseen = {(os, "stat"): "looks", (os, "lstat"): "looks", (os, "statvfs"): "looks", (torch, "from_file"): "opens"}
    calls = {key: getattr(*key) for key in unseen}
    _counts = counts = Counter(opens=0, listings=0, changes=0, looks=0)

    def counted(call: Any, what: str) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            counts[what] += 1
            return call(*args, **options)

        return noted

    for key, call in calls.items():
        setattr(*key, counted(call, unseen[key]))
    try:
        yield counts
    finally:
        _counts = None
        for key, call in calls.items():
            setattr(*key, call)


def checkpoint_operations(folder: Path, world_size: int, zero_stage: int, sample: Sequence[int]) -> dict[str, Any]:
    """Files, and metadata operations of all ranks together, of a save and of a restore under the same layout."""
    infos = {f"blocks.{i}.weight": ParameterInfo(numel=16 * world_size, decay=True) for i in range(4)}
    names, rows = list(infos), zero_table(infos, zero_stage, world_size).tolist()
    own: list[list[TensorSlice]] = [[] for _ in range(world_size)]
    for rank, number, start, stop in rows:
        own[rank].append(TensorSlice(names[number], start, stop))
    content = {"step": 1, "parameters": {name: asdict(info) for name, info in infos.items()}, "extra": {}}
    common = {"folder": folder, "attempt": 1, "world_size": world_size, "step": 1, "keep": False, "identity": {}}
    common |= {
        "state": json.dumps(content).encode(),
        "generators": json.dumps(capture_generators()).encode(),
        "names": names,
        "patience": 600.0,
    }
    jobs = [SaveJob(rank=rank, file=PieceFile(pieces), **common) for rank, pieces in enumerate(own)]
    with operations() as save:
        for job in jobs:
            job.write_share(torch.zeros(len(KINDS) * job.file.numel))
        path = jobs[0].publish()
    with operations() as restore:
        for rank in sample:
            reader = CheckpointReader(path)
            for piece in own[rank]:
                reader.read(piece, "master")
            reader.generators(rank, world_size)
    return {
        "files": len(list(path.iterdir())),
        "save": dict(save),
        "restore": {name: count * world_size // len(sample) for name, count in restore.items()},
    }


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--zero_stages", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3))
    options = parser.parse_args()
    torch.set_num_threads(1)
    software = {"torch": torch.__version__, "machine": platform.machine()}
    for world_size in options.ranks:
        sample = sorted({round(i * (world_size - 1) / (SAMPLE - 1)) for i in range(SAMPLE)})
        for zero_stage in options.zero_stages:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = checkpoint_operations(Path(folder), world_size, zero_stage, sample)
            for model in options.models:
                for name in ("growth", "restore"):
                    figures = plan_case(make_case(name, model, world_size, zero_stage), sample)
                    figures.checkpoint = checkpoint
                    figures.plan_seconds = round(figures.plan_seconds, 4)
                    head = {"model": model, "case": name, "ranks": world_size, "zero_stage": zero_stage}
                    print(json.dumps(head | asdict(figures) | {"simulated_ranks": len(sample)} | software), flush=True)


sys.addaudithook(_note)

if __name__ == "__main__":
    main()
