"""Triggers in real runs: computed stages, a stage ended on a plateau, a trial that leaves no trace but its cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.config import ModelConfig, RunConfig, StageConfig
from ds_stacking.growth.state import KINDS, TensorSlice
from ds_stacking.training.triggering import triggered_stages
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

TRIAL = "trial:stack,interleave,middle:3"
PLATEAU = "plateau:40"
"""Any loss has come to a plateau by a slope so steep."""


def steps(trigger: str, stages: str = "2:100,4:100,8:100", **fields: Any) -> list[int]:
    config = RunConfig(trigger=trigger, stages=stages, model=ModelConfig(vocab_size=4096), **fields)
    return [stage.steps for stage in triggered_stages(config)]


def test_stages_follow_the_trigger() -> None:
    assert steps("steps") == steps("plateau:1") == steps("trial:stack,interleave:5") == [100, 100, 100]
    assert steps("tokens:20480,61440") == [10, 20, 100]
    assert steps("prop:1") == [50, 100, 150]
    by_flops = steps("flops:1e11,3e11")
    assert by_flops[0] > 5 and by_flops[1] > 5 and by_flops[2] == 100
    with pytest.raises(UserError, match="give two"):
        steps("gstack")
    with pytest.raises(UserError, match="choose another trigger"):
        steps("gstack", "2:100,4:100")
    with pytest.raises(UserError, match="no lr in stages"):
        triggered_stages(RunConfig(trigger="plateau:1", stages=[StageConfig(layers=2, steps=5, lr=0.1)]))


def train(folder: str, output: str, *options: str, cut: int = 0) -> None:
    """A run of three stages; stopped after step `cut` and resumed."""
    from ds_stacking.training.loop import Pretraining
    from ds_stacking.training.run import pretrain

    arguments = [*small_options(Path(folder)), f"--output_dir={folder}/{output}", "--tracking=none", "--resume=auto"]
    config = [*arguments, "--eval_every=0", "--eval_after_growth=0", *options]
    original = Pretraining.stop_if_asked

    def stop_if_asked(self: Pretraining, told: bool) -> None:
        original(self, told or self.position.step == cut)

    if cut:
        Pretraining.stop_if_asked = stop_if_asked
        with pytest.raises(RunAgain):
            pretrain(parse_run(config))
        Pretraining.stop_if_asked = original
    pretrain(parse_run(config))


def case(folder: str) -> None:
    train(folder, "trial", f"--trigger={TRIAL}")
    chosen = [growth["operator"] for growth in json.loads(Path(folder, "trial/summary.json").read_text())["growths"]]
    stages = [
        {"layers": 1, "steps": 8},
        *({"layers": 2 * i, "steps": 8, "operator": o} for i, o in enumerate(chosen, 1)),
    ]
    train(folder, "chosen", f"--stages={json.dumps(stages)}")
    train(folder, "plateau", f"--trigger={PLATEAU}", "--stages=1:40,2:8")
    train(folder, "cut", f"--trigger={PLATEAU}", "--stages=1:40,2:8", cut=12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triggers")
    write_corpus(folder / "corpus")
    run_ranks(1, case, str(folder))
    return folder


def final(run: Path) -> CheckpointReader:
    return CheckpointReader(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])))


def assert_equal_to_the_bit(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.parameters == second.parameters and first.extra["position"] == second.extra["position"]
    for name, info in first.parameters.items():
        for kind in KINDS:
            piece = TensorSlice(name, 0, info.numel)
            assert first.read(piece, kind).equal(second.read(piece, kind)), (name, kind)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.distributed
def test_a_trial_keeps_the_best_and_leaves_no_trace_but_its_cost(runs: Path) -> None:
    trial, chosen = (json.loads((runs / name / "summary.json").read_text()) for name in ("trial", "chosen"))
    assert_equal_to_the_bit(runs / "trial", runs / "chosen")
    tried = records(runs / "trial", "trial")
    assert [record["operator"] for record in tried] == ["stack", "interleave", "middle"] * 2
    for growth, losses in zip(trial["growths"], (tried[:3], tried[3:]), strict=True):
        assert growth["operator"] == min(losses, key=lambda record: record["eval_loss"])["operator"]
    assert trial["tokens"] - chosen["tokens"] == 2 * 3 * 3 * 512, "two growths, three operators, three steps"
    assert trial["flops"] > chosen["flops"]
    assert [stage["steps"] for stage in trial["stages"]] == [8, 8, 8]
    losses = [[record["loss"] for record in records(runs / name, "train")] for name in ("trial", "chosen")]
    assert losses[0] == losses[1]


@pytest.mark.distributed
def test_a_plateau_ends_a_stage_and_the_next_one_gets_its_steps(runs: Path) -> None:
    summary = json.loads((runs / "plateau" / "summary.json").read_text())
    counts = [stage["steps"] for stage in summary["stages"]]
    assert counts == [15, 33], "15 lines are the first whose later half has eight; the run is as long as it was to be"
    assert [record["step"] for record in records(runs / "plateau", "growth")] == [15]
    assert_equal_to_the_bit(runs / "plateau", runs / "cut")
