"""What is saved comes back to the bit, from any sharding, in the promised size and without pickle."""

from __future__ import annotations

import builtins
import io
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ds_stacking.checkpoint.format import PieceFile, parse_key, tensor_key
from ds_stacking.checkpoint.select import newest_valid
from ds_stacking.checkpoint.snapshot import Snapshot, pieces_to_write
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.common.errors import UserError
from ds_stacking.growth.exchange import OneRank
from ds_stacking.growth.holdings import holdings
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.growth.state import KINDS, FullState, TensorSlice
from tests.checkpoint.stores import IDENTITY, NUMELS, PARAMETERS, Shard, equal, random_state, save, stored
from tests.growth.simulated import run_threads


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_sharding_comes_back_to_the_bit(tmp_path, world_size, sharded, asynchronous) -> None:
    full = random_state(1)
    paths = run_threads(
        world_size,
        lambda exchange: save(
            tmp_path,
            5,
            Shard(full, exchange.rank, world_size) if sharded else full,
            exchange,
            asynchronous=asynchronous,
        ),
    )
    assert paths[0] == tmp_path / "step-5" and paths[1:] == [None] * (world_size - 1)
    assert equal(stored(paths[0]), full)
    assert newest_valid(tmp_path, IDENTITY).path == paths[0]


def test_special_values_keep_their_bits(tmp_path) -> None:
    state = random_state(0)
    state.tensors["master"]["blocks.0.weight"][:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3e38])
    assert equal(stored(save(tmp_path, 1, state)), state)


def test_everything_else_comes_back(tmp_path) -> None:
    extra = {"position": {"samples": 2**53 + 1}, "ledger": [0.1, 1 / 3], "wandb": None, "text": "ä"}
    path = save(tmp_path, 9, extra=extra)
    reader = CheckpointReader(path)
    assert (reader.step, reader.extra, reader.parameters) == (9, extra, PARAMETERS)
    assert reader.steps == dict.fromkeys(NUMELS, 5)
    assert reader.generators(0, 1) is not None and reader.generators(0, 2) is None


def test_ranks_write_disjoint_pieces_of_equal_size(tmp_path) -> None:
    full = random_state(1)
    run_threads(4, lambda exchange: save(tmp_path, 1, full, exchange))
    files = sorted((tmp_path / "step-1").glob("rank-*.safetensors"))
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert len(files) == 4 and sum(sizes) == 3 * sum(NUMELS.values())
    assert max(sizes) - min(sizes) <= 3 * len(NUMELS)


def test_partly_shared_pieces_are_written_once() -> None:
    tables = [
        [TensorSlice("a", 0, 6)],
        [TensorSlice("a", 4, 10), TensorSlice("b", 0, 1)],
        [TensorSlice("a", 0, 10), TensorSlice("b", 0, 1)],
    ]
    everyone = run_threads(3, lambda exchange: holdings(tables[exchange.rank], ["a", "b"], exchange))
    written = [piece for rank in range(3) for piece in pieces_to_write(tables[rank], everyone[rank], rank)]
    for name, numel in {"a": 10, "b": 1}.items():
        elements = sorted(e for piece in written if piece.name == name for e in range(piece.start, piece.stop))
        assert elements == list(range(numel))


def test_size_is_twelve_bytes_for_each_parameter(tmp_path) -> None:
    numels = {f"blocks.{i}.{part}": n for i in range(12) for part, n in (("w", 65536), ("v", 16384), ("b", 256))}
    full = random_state(0, numels)
    parameters = {name: ParameterInfo(numel=n, decay=True) for name, n in numels.items()}

    def case(exchange) -> None:
        writer = CheckpointWriter(tmp_path, exchange, identity=IDENTITY)
        writer.save(1, Shard(full, exchange.rank, 2), parameters, extra={"ledger": list(range(100))})
        assert writer.wait()

    run_threads(2, case)
    size = sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir())
    assert size <= 12 * sum(numels.values()) * 1.01


def test_files_are_json_and_safetensors_and_private(tmp_path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 1)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["manifest.json", "pieces.safetensors", "rank-00000.json", "rank-00000.safetensors", "state.json"]
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_state_at_the_time_of_the_call_is_stored(tmp_path, monkeypatch) -> None:
    """The writing is held up until the live state and `extra` have changed."""
    import threading

    from ds_stacking.checkpoint.job import SaveJob

    changed, write_share = threading.Event(), SaveJob.write_share
    monkeypatch.setattr(SaveJob, "write_share", lambda job, v: (changed.wait(10), write_share(job, v)))
    live, before, extra = random_state(1), random_state(1), {"position": [1]}
    writer = CheckpointWriter(tmp_path, OneRank(), identity=IDENTITY)
    writer.save(1, live, PARAMETERS, extra=extra)
    for kind in KINDS:
        for values in live.tensors[kind].values():
            values.add_(1)
    extra["position"][0] = 2
    assert writer.reports() == [] and not (tmp_path / "step-1").exists()
    changed.set()
    assert writer.wait()
    assert equal(stored(tmp_path / "step-1"), before) and not equal(live, before)
    assert CheckpointReader(tmp_path / "step-1").extra == {"position": [1]}


def test_the_buffer_is_used_again(tmp_path) -> None:
    snapshot, buffers = Snapshot(), set()
    writer = CheckpointWriter(tmp_path, OneRank(), identity=IDENTITY)
    for step in (1, 2, 3):
        state = random_state(step)
        buffers.add(snapshot.take(state, PieceFile(state.slices())).data_ptr())
        writer.save(step, state, PARAMETERS, extra={})
        assert writer.wait()
        assert equal(stored(tmp_path / f"step-{step}"), state)
    assert len(buffers) == 1


def test_a_reader_gives_any_slice(tmp_path) -> None:
    full = random_state(3)
    run_threads(3, lambda exchange: save(tmp_path, 1, Shard(full, exchange.rank, 3), exchange))
    reader = CheckpointReader(tmp_path / "step-1")
    for start, stop in [(0, 1009), (0, 0), (300, 301), (350, 1000), (358, 359), (1008, 1009)]:
        piece = TensorSlice("embedding", start, stop)
        for kind in KINDS:
            assert torch.equal(reader.read(piece, kind), full.read(piece, kind))


def test_a_reader_opens_no_file_but_those_it_reads_from(tmp_path, monkeypatch) -> None:
    run_threads(7, lambda exchange: save(tmp_path, 1, Shard(random_state(1), exchange.rank, 7), exchange))
    opened: list[str] = []
    for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (torch, "from_file")):
        monkeypatch.setattr(owner, name, _noting(getattr(owner, name), opened))
    reader = CheckpointReader(tmp_path / "step-1")
    reader.read(TensorSlice("embedding", 0, 10), "master")
    reader.read(TensorSlice("embedding", 0, 10), "exp_avg")
    files = sorted(name for name in opened if name != "step-1")
    assert files == ["manifest.json", "pieces.safetensors", "rank-00000.safetensors", "state.json"]


def _noting(function: Callable, names: list[str]) -> Callable:
    def noted(path: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(path, int):
            names.append(Path(path).name)
        return function(path, *args, **options)

    return noted


def test_a_reader_refuses_what_does_not_cover_the_parameters(tmp_path) -> None:
    class Gap(FullState):
        def slices(self) -> list[TensorSlice]:
            return [s._replace(stop=s.stop - 1) if s.name == "embedding" else s for s in super().slices()]

    state = Gap(NUMELS)
    with pytest.raises(UserError, match="does not hold all of embedding"):
        CheckpointReader(save(tmp_path, 1, state))


def test_keys_and_layout() -> None:
    pieces = [TensorSlice("a/b.c-d", 3, 10), TensorSlice("x", 0, 2)]
    file = PieceFile(pieces)
    assert [parse_key(tensor_key(piece, kind)) for kind in KINDS for piece in pieces] == [
        (piece, kind) for kind in KINDS for piece in pieces
    ]
    assert file.position(pieces[1], "exp_avg_sq") == 2 * 9 + 7 and len(file.header) % 8 == 0
    for wrong in ("a", "weights/x/0-2", "master/x/0"):
        with pytest.raises(ValueError):
            parse_key(wrong)


def test_parameters_need_not_have_equal_step_counts(tmp_path) -> None:
    parameters = {name: replace(info, step=i) for i, (name, info) in enumerate(PARAMETERS.items())}
    writer = CheckpointWriter(tmp_path, OneRank(), identity=IDENTITY, asynchronous=False)
    writer.save(1, random_state(1), parameters, extra={})
    assert CheckpointReader(tmp_path / "step-1").parameters == parameters
