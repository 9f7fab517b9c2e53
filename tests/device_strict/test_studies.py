"""Fine-tuning on GLUE and the analysis of attention on the double of a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_stacking.studies.attention.configuration import AttentionConfig
from ds_stacking.studies.attention.run import analyse
from ds_stacking.studies.glue.configuration import GlueConfig
from ds_stacking.studies.glue.run import GlueRun
from tests.device_strict.double import strict_device
from tests.ranks import run_ranks
from tests.studies.attention.test_attention import write_run
from tests.studies.glue.glue_files import write_encoder, write_task


def fine_tune(folder: Path) -> None:
    options = {"model": str(folder / "m"), "data": str(folder / "glue"), "output_dir": str(folder / "out")}
    with strict_device(0):
        run = GlueRun(GlueConfig(**options, seeds=1, tasks="SST-2,STS-B", lr="5e-3", epochs="2", batch_size="8"))
        run.check_data()
        run.make_folder()
        run.run()


@pytest.mark.distributed
def test_fine_tuning(tmp_path: Path) -> None:
    write_encoder(tmp_path / "m")
    for task in ("SST-2", "STS-B"):
        write_task(tmp_path / "glue", task, train=32)
    run_ranks(1, fine_tune, tmp_path)
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "results").glob("*.json")]
    assert {result["task"] for result in results} == {"SST-2", "STS-B"} and not any("failed" in r for r in results)


def test_attention(tmp_path: Path) -> None:
    write_run(tmp_path)
    with strict_device(0):
        folder = analyse(AttentionConfig(model=str(tmp_path / "run"), sequences=6))
    assert len(json.loads((folder / "attention.json").read_text())["stages"]) == 2
