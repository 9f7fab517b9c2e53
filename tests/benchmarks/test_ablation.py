"""The ablation: all runs different and valid, branches begin where their trunk grows, and the table finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.config import StageConfig
from ds_stacking.growth.operators import layer_map

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import ablation

    return ablation


def test_every_run_is_a_recipe_of_its_own(ablation: Any, tmp_path: Path) -> None:
    runs = dict(ablation.runs(tmp_path, [120, 280], 1))
    assert len(runs) == 2 * 4 * 3 * 2 + 2
    configs = {name: parse_run([*ablation.OPTIONS, *options]) for name, options in runs.items()}
    assert len({json.dumps(config.to_dict()) for config in configs.values()}) == len(runs)
    for name, config in configs.items():
        stages = config.stages
        assert isinstance(stages, list) and all(isinstance(stage, StageConfig) for stage in stages)
        assert sum(stage.steps for stage in stages) == ablation.STEPS
        if len(stages) == 2:
            assert len(layer_map(config.operator, stages[0].layers, stages[1].layers)) == stages[1].layers
            trunk = tmp_path / f"g{stages[0].steps}-stack-stack-0-seed1" / "checkpoints" / f"step-{stages[0].steps}"
            assert config.branch_from == (None if name in str(trunk) else str(trunk))


def test_the_table_shows_means_over_seeds(ablation: Any, tmp_path: Path) -> None:
    for seed, loss in ((1, 5.0), (2, 5.5)):
        folder = tmp_path / f"g120-middle-reset-40-seed{seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"eval_loss_masked": loss}))
    lines = ablation.table(ablation.losses(tmp_path, range(1, 3)), 120).splitlines()
    assert lines[-1] == "| `middle`, new blocks warmed up over 40 steps | - | - | - | 5.250 |"
    assert all("5." not in line for line in lines[:-1])
