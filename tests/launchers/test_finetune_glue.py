"""finetune_glue.py as a launcher starts it: two ranks share the jobs, and find what one rank finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_stacking.studies.glue.configuration import GlueConfig
from ds_stacking.studies.glue.run import GlueRun
from tests.ranks import run_ranks
from tests.studies.glue.glue_files import write_encoder, write_task

ROOT = Path(__file__).parents[2]


def start(*options: object, rank: int = 0, world_size: int = 1) -> subprocess.Popen:
    """One rank, with what the deepspeed launcher gives it."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # nothing listens there: ranks need no group
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        str(ROOT / "launchers" / "finetune_glue.py"),
        f"--local_rank={rank}",
        *map(str, options),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def one_rank(config: GlueConfig) -> None:
    """All jobs on this rank."""
    run = GlueRun(config)
    run.make_folder()
    run.run()


def scores(folder: Path) -> dict[str, dict]:
    """Scores of every training, by the name of its file."""
    return {path.name: json.loads(path.read_text())["scores"] for path in (folder / "results").glob("*.json")}


@pytest.mark.distributed
def test_two_ranks_share_the_jobs_and_find_what_one_finds(tmp_path: Path) -> None:
    model, glue = write_encoder(tmp_path / "m"), tmp_path / "glue"
    for task in ("RTE", "CoLA"):
        write_task(glue, task)
    settings = {"model": str(model), "data": str(glue), "tasks": "RTE,CoLA", "seeds": 1, "lr": "1e-2,1e-4"}
    options = [f"--{name}={value}" for name, value in settings.items()]
    ranks = [start(*options, f"--output_dir={tmp_path / 'two'}", rank=rank, world_size=2) for rank in (0, 1)]
    alone = GlueConfig(**settings, output_dir=str(tmp_path / "one"))
    run_ranks(1, one_rank, alone)
    output = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], output
    found = scores(tmp_path / "two")
    assert found == scores(tmp_path / "one") and len(found) == 2 * (2 + 1), (
        "two trainings to choose by, one at the chosen"
    )
    done = [[line for line in out.splitlines() if "seed" in line and " s)" in line] for out, _ in output]
    assert len(done[0]) + len(done[1]) == 6, "every job was done once"
    assert "chosen of 2 settings" in output[0][0] and "32 examples held out of the training set" in output[0][0]
    assert "| RTE" in output[0][0] and "| RTE" not in output[1][0]
    assert (tmp_path / "two" / "submission.zip").is_file()


def test_bad_input_ends_with_one_sentence(tmp_path: Path) -> None:
    for options, message in (
        (["--model=m", "--tasks=SST3"], "did you mean SST-2?"),
        (["--tasks=RTE"], "--model is missing"),
        (["--model=m", "--seed=2"], "did you mean --seeds?"),
        (["--model=m", "--dropout=1.5"], "dropout is 1.5; it must lie in [0, 1)"),
    ):
        process = start(*options)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert message in errors and len(errors.strip().splitlines()) == 1
