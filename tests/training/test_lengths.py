"""Stages of different lengths in a whole run: each length has epochs of its own, also behind a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

STAGES = (
    '[{"layers": 1, "steps": 3, "sequence_length": 16}, {"layers": 1, "steps": 3}, '
    '{"layers": 1, "steps": 3, "sequence_length": 16}]'
)


def run(folder: str, name: str, *options: str) -> list[tuple[int, list[int]]]:
    """The length and the places in its epochs of what each micro-batch was made of."""
    from ds_stacking.training.run import pretrain

    seen: list[tuple[int, list[int]]] = []

    def prepare(built: Any) -> None:
        for length, source in built.batches.items():
            source.batch = partial(recorded, length, source.batch)

    def recorded(length: int, right: Any, samples: Any, others: int) -> Any:
        seen.append((length, (samples - others).tolist()))
        return right(samples, others)

    given = [
        *small_options(Path(folder)),
        "--tracking=none",
        "--deepspeed_config=ds_configs/zero2.json",
        "--schedule=constant",
    ]
    given += [
        f"--stages={STAGES}",
        "--checkpoint_every=1",
        "--checkpoint_keep=9",
        "--checkpoint_async=false",  # else a slow disk makes it leave some out
        "--eval_every=0",
        "--micro_batch_size=64",
    ]
    pretrain(parse_run([*given, f"--output_dir={folder}/{name}", *options]), on_built=prepare)
    return seen


@pytest.mark.distributed
def test_each_length_goes_on_where_it_was(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    whole = run_ranks(1, run, str(tmp_path), "whole")[0]
    for length, sequences in ((16, 32), (32, 16)):
        places = [place for found, part in whole if found == length for place in part]
        assert places == list(range(sequences * (6 if length == 16 else 3)))
    branch = f"--branch_from={tmp_path / 'whole' / 'checkpoints' / 'step-8'}"
    assert run_ranks(1, run, str(tmp_path), "branch", branch)[0] == whole[8:]
