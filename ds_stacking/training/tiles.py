"""The tiles of a run's kernels: measured by rank 0 before the first step, the same on all ranks and in a resumed run.

Tiles decide in which order a kernel adds, and so the last bits of a run. They stand in tiles.json by GPU and version
of Triton: a resumed run takes them from there and measures only what is missing, as after a change of the micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_stacking.checkpoint.share import from_first_rank
from ds_stacking.common.files import write_json
from ds_stacking.common.generators import isolated_generators
from ds_stacking.common.json_files import read_json
from ds_stacking.config import RunConfig
from ds_stacking.data.batches import Batch
from ds_stacking.engine.release import collect
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.models.compiling import compile_anew
from ds_stacking.training.run_contents import TILES

Shape = tuple[int, int]
"""Sequences of a micro-batch, and their length."""
Tiles = dict[str, str]
"""{key of a launch: configuration}"""


def settle_tiles(
    config: RunConfig,
    shapes: Iterable[Shape],
    read: Callable[[int, np.ndarray], Batch],
    device: torch.device,
    dtype: torch.dtype,
    *,
    log: Callable[[str], None],
    alive: Callable[[], None] = lambda: None,
    compare: Any = None,
) -> None:
    """Settle the tiles of every launch that training on micro-batches of these `shapes` makes on `device`.

    All ranks call it together, before anything is trained and in the run directory that is theirs. Where ranks have
    different GPUs, those of rank 0's architecture follow it, the others run the predicted tiles.

    Args:
        read: (sequence length, sample numbers) -> batch.
        dtype: That of the weights.
        alive: Called on all ranks while rank 0 gets on.
        compare: What times the candidates, in the place of the device.

    Raises:
        UserError: tiles.json is damaged.
        OtherRankFailed: Rank 0 failed.
    """
    from ds_stacking.models import tiles  # seconds to import

    chosen: Tiles = {}

    def decide() -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with the first one
        saved, here, notes = read_tiles(Path(config.run_dir)), tiles.environment(device), []
        chosen.update(saved.get(here, {}))
        tiles.use(chosen)
        if saved and here not in saved:
            notes.append(f"tiles were chosen on {', '.join(saved)}; this is {here}: results may differ in last bits")
        if config.tiles == "measure":
            batches = [read(length, np.arange(size)) for size, length in shapes]
            notes += _measure(config, batches, device, dtype, chosen, compare)
        if chosen != saved.get(here, {}):
            write_json(Path(config.run_dir) / TILES, saved | {here: chosen}, inside=Path(config.run_dir))
        return {"chosen": chosen, "notes": notes}

    answer = from_first_rank(decide, make_exchange(device), progress=lambda: len(chosen), alive=alive)
    tiles.use(answer["chosen"])
    for note in answer["notes"]:
        log(note)
    if config.compile:  # a graph holds the tiles that it was traced with, and torch's cache does not see them
        text = json.dumps([tiles.source_digest(), answer["chosen"]], sort_keys=True)
        compile_anew(hashlib.sha256(text.encode()).hexdigest())


def _measure(
    config: RunConfig, batches: list[Batch], device: torch.device, dtype: torch.dtype, chosen: Tiles, compare: Any
) -> list[str]:
    """Rank 0: add the tiles that are not known yet to `chosen`; what is to be said of it."""
    from ds_stacking.models import tiles

    start, missing, full = time.perf_counter(), Tiles(), ""
    with isolated_generators(config.seed):
        for batch in batches:
            missing |= tiles.needed_tiles(config.model, batch.inputs, device, dtype)
        if not missing:
            return []
        try:
            for batch in batches:
                tiles.measure_tiles(config.model, batch.inputs, device, dtype, found=chosen, compare=compare)
        except torch.OutOfMemoryError:
            full = f", {len(missing.keys() - chosen.keys())} predicted, since memory ran out"
    collect()
    measured = len(missing.keys() & chosen.keys())
    chosen.update({key: config for key, config in missing.items() if key not in chosen})
    return [f"tiles of {measured} kernel launches measured in {time.perf_counter() - start:.0f} s{full}"]


def read_tiles(run_dir: Path) -> dict[str, Tiles]:
    """What the run has chosen, by GPU and version of Triton. Raises UserError where tiles.json is damaged."""
    try:
        return read_json(
            run_dir / TILES, dict[str, Tiles], mend="delete it, and tiles are chosen anew", inside=run_dir
        )
    except FileNotFoundError:
        return {}
