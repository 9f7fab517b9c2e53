"""Under ZeRO 3 no rank ever holds the whole model: built, grown, restored and exported on 4 ranks, memory watched.

Memory is what the process itself made (RssAnon), sampled every millisecond: a mapped checkpoint is the page cache's.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.checkpoint.write import CheckpointWriter
from ds_stacking.config import ModelConfig
from ds_stacking.engine import consolidate
from ds_stacking.engine.consolidate import gather_masters
from ds_stacking.engine.factory import EngineFactory, EngineSpec, device
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import parameter_shapes, save_huggingface
from tests.engine.tiny import SEED, factory, model_config, replaced, spec
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

RANKS, LAYERS = 4, 12
MODEL = ModelConfig(hidden_size=400, num_heads=4, vocab_size=101, max_positions=16, dropout=0.0, attention_dropout=0.0)
BLOCK = 12 * 400 * 400
WHOLE = sum(shape.numel() for shape in parameter_shapes(MODEL, LAYERS).values())
CONSTANT = 16 << 20
"""Bytes for what does not grow with the model: buffers of the exchange and of gloo, pages that malloc keeps."""
MMAP_THRESHOLD = -3
"""glibc's number of the size above which memory is mapped, and given back: what was freed must not be counted."""
WORKING, STATE = 2, 18
"""Bytes for each parameter of the share: the bf16 weights; and masters, moments, and gradients in both precisions."""


class Watch:
    """The largest growth of this process's own memory by phase, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before, ended = own_memory(), threading.Event()
        samples = [before]

        def sample() -> None:
            while not ended.wait(0.001):
                samples.append(own_memory())

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield
        finally:
            ended.set()
            sampler.join()
            self.peaks[phase] = max(self.peaks.get(phase, 0), max(samples) - before)


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


def made(watch: Watch, layer_by_layer: bool = True) -> EngineFactory:
    """Engines whose construction of the model is watched by itself: there the whole model would stand."""

    def construct(self: EngineFactory, *args: Any) -> Any:
        with watch("construct"):
            return EngineFactory.construct(self, *args)

    watched = type("Watched", (EngineFactory,), {"construct": construct})
    return watched(
        build_model=lambda layers, initialize: Bert(MODEL, layers, initialize=initialize),
        ds_config={"zero_optimization": {"stage": 3}},
        optimizer=factory(3).optimizer,
        bf16=True,
        layer_by_layer=layer_by_layer,
    )


def life(folder: Path) -> dict[str, int]:
    """Peaks of this rank; the faults' too."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    half, full = (EngineSpec(layers=layers, micro_batch_size=1) for layers in (LAYERS // 2, LAYERS))
    warm = StageManager(factory(3, bf16=True), seed=SEED)
    warm.start(spec(2))
    warm.grow(spec(4))
    warm.close()
    watch = Watch()
    for memory in ("normal", "low"):
        manager = StageManager(made(watch), seed=SEED, growth_memory=memory)
        with watch("start"):
            manager.start(half)
        with watch(f"grow {memory}"):
            manager.grow(full, operator="stack")
        if memory == "normal":
            writer = CheckpointWriter(folder / "checkpoints", make_exchange(device()), identity={}, asynchronous=False)
            writer.save(1, LiveState(manager.engine), manager.current_parameters(), extra={})
            assert writer.wait()
            del writer
        manager.close()
    reader = CheckpointReader(folder / "checkpoints" / "step-1")
    manager = StageManager(made(watch), seed=SEED)
    with watch("restore"):
        manager.restore(full, reader.parameters, reader, stage=1)
    with watch("export"):
        export(manager, folder / "export")
    with replaced(consolidate, "groupby", lambda entries, key: [(None, entries)]), watch("export at once"):
        export(manager, folder / "export at once")
    manager.close()
    faulty = Watch()
    manager = StageManager(made(faulty, layer_by_layer=False), seed=SEED)
    manager.start(full)
    return watch.peaks | {"construct at once": faulty.peaks["construct"]}


def drawn(bf16: bool) -> tuple[list[str], list[str]]:
    """Weights on rank 0 that differ from those of a plain construction, at the start and in fresh blocks."""
    config = replace(model_config(), next_sentence=True)
    made = replace(
        factory(3, bf16=bf16), build_model=lambda layers, initialize: Bert(config, layers, initialize=initialize)
    )
    manager = StageManager(made, seed=SEED)
    manager.start(spec(2))
    started = differing_weights(manager, Bert, config, 2, SEED, bf16)
    manager.grow(spec(3), operator="fresh")
    grown = [n for n in differing_weights(manager, Bert, config, 3, SEED + 3, bf16) if n.startswith("blocks.2.")]
    manager.close()
    return started, grown


def differing_weights(
    manager: StageManager, build: type[Bert], config: ModelConfig, layers: int, seed: int, bf16: bool
) -> list[str]:
    torch.manual_seed(seed)
    plain = dict(build(config, layers).named_parameters())
    found = dict(gather_masters(manager.engine, manager.parameters))
    assert found.keys() == (plain.keys() if dist.get_rank() == 0 else set())
    expected = {name: p.detach().bfloat16().float() if bf16 else p.detach() for name, p in plain.items()}
    return [name for name, values in found.items() if not torch.equal(values, expected[name])]


def drawn_both() -> list:
    return [drawn(bf16) for bf16 in (False, True)]


def test_a_partitioned_model_is_drawn_as_a_whole_one_to_the_bit() -> None:
    for found in run_ranks(3, drawn_both):
        assert found == [([], []), ([], [])]


def export(manager: StageManager, folder: Path) -> None:
    tensors = gather_masters(manager.engine, manager.parameters)
    if dist.get_rank() == 0:
        save_huggingface(folder, tensors, MODEL, LAYERS)
    for _ in tensors:
        pass


@pytest.mark.slow
def test_peak_memory_is_the_share_two_blocks_and_a_constant(tmp_path) -> None:
    peaks = run_ranks(RANKS, life, tmp_path)
    two_blocks = 2 * 4 * BLOCK
    over = {
        "construct": WORKING * WHOLE // RANKS,
        "start": STATE * WHOLE // 2 // RANKS,
        "grow normal": STATE * WHOLE // RANKS,
        "grow low": STATE * WHOLE // RANKS,
        "restore": STATE * WHOLE // RANKS,
        "export": 0,
    }
    largest = {phase: max(rank[phase] for rank in peaks) for phase in peaks[0]}
    limits = {phase: share + two_blocks + CONSTANT for phase, share in over.items()}
    print({phase: (size >> 20, limits.get(phase, 0) >> 20) for phase, size in largest.items()}, "MB, and the limit")
    assert {phase for phase in over if largest[phase] > limits[phase]} == set()
    for phase in ("construct", "export"):
        assert largest[f"{phase} at once"] > limits[phase], "the test would not notice the whole model"
