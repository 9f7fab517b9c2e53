"""Planning for many ranks: simulated ranks agree on their moves; one rank's work does not grow with their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_stacking.config import ModelConfig
from ds_stacking.growth import schedule
from ds_stacking.growth.holdings import Holdings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import scale

    tiny = ModelConfig(hidden_size=30, num_heads=2, vocab_size=101, max_positions=16)
    monkeypatch.setattr(scale, "MODELS", {"tiny": (tiny, 4)})
    return scale


def wanted(case: Any) -> Counter:
    """Every element that some rank wants of a tensor that is copied: (rank, tensor, element)."""
    names = [entry.target for entry in case.plan.entries]
    return Counter(
        (rank, names[number], element)
        for rank, number, start, stop in case.wanted.tolist()
        for element in range(start, stop)
    )


@pytest.mark.parametrize("name", ["growth", "restore"])
@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("world_size", [3, 16])
def test_the_moves_of_all_ranks_fit_together(scale: Any, name: str, zero_stage: int, world_size: int) -> None:
    """Both ends of a move know it, every wanted element arrives once, and whoever sends it holds it."""
    case = scale.make_case(name, "tiny", world_size, zero_stage)
    sources = list(dict.fromkeys(entry.source for entry in case.plan.entries))
    holds = [
        {(s.name, e) for s in case.slices(case.held, r, sources) for e in range(s.start, s.stop)}
        for r in range(world_size)
    ]
    arriving, leaving = Counter(), Counter()
    for rank in range(world_size):
        for move in case.moves(rank)[0]:
            assert rank in (move.src_rank, move.dst_rank)
            assert all((move.source.name, e) in holds[move.src_rank] for e in range(move.start, move.stop))
            if move.dst_rank == rank:
                arriving[move] += 1
            if move.src_rank == rank:
                leaving[move] += 1
    assert arriving == leaving and set(arriving.values()) == {1}
    found = Counter((m.dst_rank, m.entry.target, e) for m in arriving for e in range(m.start, m.stop))
    assert found == wanted(case)
    if zero_stage == 3 or name == "restore":
        assert not any(move.crosses for move in arriving), "what a rank holds itself does not cross"


@pytest.mark.parametrize("limit", [1, 7, 100, 10_000])
def test_rounds_are_agreed_on_and_bounded(scale: Any, limit: int) -> None:
    case = scale.make_case("growth", "tiny", 5, 1)
    planned = [case.moves(rank) for rank in range(5)]
    crossing = [[move for move in moves if move.crosses] for moves, _ in planned]
    load = torch.tensor(
        [
            [sum(m.numel for m in moves if m.src_rank == r), sum(m.numel for m in moves if m.dst_rank == r)]
            for r, moves in enumerate(crossing)
        ]
    )
    made = []
    for moves, (_, exchange) in zip(crossing, planned, strict=True):
        exchange.load = load
        made.append(schedule.rounds(moves, limit, exchange))
    assert load.sum() > 0 and {len(parts) for parts in made} == {-(-int(load.max()) // limit)}
    for number in range(len(made[0])):
        for rank in range(5):
            sent = [move for move in made[rank][number] if move.src_rank == rank]
            for other in range(5):
                got = [move for move in made[other][number] if move.src_rank == rank and move.dst_rank == other]
                assert got == [move for move in sent if move.dst_rank == other], "in the same order at both ends"
            assert sum(move.numel for move in sent) <= limit + len({move.dst_rank for move in sent})
    for rank, moves in enumerate(crossing):
        elements = Counter((m.entry.target, m.src_rank, m.dst_rank, e) for m in moves for e in range(m.start, m.stop))
        assert elements == Counter(
            (m.entry.target, m.src_rank, m.dst_rank, e)
            for part in made[rank]
            for m in part
            for e in range(m.start, m.stop)
        )


def python_work(scale: Any, monkeypatch: pytest.MonkeyPatch, name: str, world_size: int, zero_stage: int) -> int:
    """Moves made and rows of tables turned into Python numbers while one rank in the middle plans."""
    case = scale.make_case(name, "tiny", world_size, zero_stage)
    rows: list[int] = []
    overlapping = Holdings.overlapping

    def counted(self: Holdings, *place: Any) -> torch.Tensor:
        found = overlapping(self, *place)
        rows.append(len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Holdings, "overlapping", counted)
        moves, _ = case.moves(world_size // 2)
    return len(moves) + sum(rows)


@pytest.mark.parametrize("name", ["growth", "restore"])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_ranks_work_does_not_grow_with_the_ranks(scale: Any, monkeypatch: Any, name: str, zero_stage: int) -> None:
    work = [python_work(scale, monkeypatch, name, world_size, zero_stage) for world_size in (8, 16, 64)]
    assert work[0] >= work[1] >= work[2] or max(work) <= 1.2 * work[0], work


def test_it_prints_one_line_per_case(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--ranks",
        "8",
        "--models",
        "bert_base",
        "--zero_stages",
        "2",
        "3",
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=os.environ)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["case"], line["zero_stage"]) for line in lines] == [
        ("growth", 2), ("restore", 2), ("growth", 3), ("restore", 3),
    ]  # fmt: skip
    for line in lines:
        assert line["plan_seconds"] < 5 and line["simulated_ranks"] == line["ranks"] == 8
        assert line["checkpoint"]["files"] == 2 * 8 + 3
        # its own five files, four of them by way of their folder
        assert line["checkpoint"]["restore"]["opens"] == 8 * 9, "a rank opens no other rank's file"
