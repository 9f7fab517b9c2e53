"""Triggers in real runs: computed stages, a stage ended on a plateau, a trial that leaves no trace but its cost."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.config import ModelConfig, RunConfig, StageConfig
from ds_stacking.growth.state import KINDS, TensorSlice
from ds_stacking.training.state import HeldOutLoss
from ds_stacking.training.triggering import triggered_stages
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks
from tests.training.faults import stop_at

TRIAL = "trial:stack,interleave,middle:3"
PLATEAU = "plateau:0.0575"
FALLS = 20
"""Steps in which the held-out loss of the runs with that trigger falls; then it stays."""
WARMUP = 4


def made_up_loss(step: int) -> float:
    return 5.0 * min(step, FALLS) ** -0.5


def ends_at() -> int:
    """The first step whose later half of evaluations has a slope above -0.0575 by three standard errors."""
    for step in range(WARMUP + 16, 100):
        evaluated = np.arange(WARMUP + 1, step + 1)
        later = evaluated[len(evaluated) // 2 :]
        losses = np.log([made_up_loss(int(s)) for s in later])
        (slope, _), covariance = np.polyfit(np.log(later), losses, 1, cov=True)
        if slope - 3 * covariance[0, 0] ** 0.5 > -0.0575:
            return step
    raise AssertionError


def steps(trigger: str, stages: str = "2:100,4:100,8:100", **fields: Any) -> list[int]:
    config = RunConfig(trigger=trigger, stages=stages, model=ModelConfig(vocab_size=4096), **fields)
    return [stage.steps for stage in triggered_stages(config)]


def test_stages_follow_the_trigger() -> None:
    assert steps("steps") == steps("plateau:1", eval_every=3) == steps("trial:stack,interleave:5") == [100, 100, 100]
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


@pytest.mark.parametrize(
    ("stages", "every", "part"),
    [
        ("2:100,4:100", 4, "stage 2:100 has 12 with --eval_every 4; give --eval_every 3 or less"),
        ("2:100,4:100", 0, "has 0 with --eval_every 0; give --eval_every 3 or less"),
        ("2:92,4:100", 3, "2:92 has 14 with --eval_every 3; give --eval_every 2 or less"),
        ("2:1000,4:15,8:1000", 1, "stage 4:15 has 14 with --eval_every 1; give the stage more steps"),
        ("2:40,4:100", 1, "stage 2:40 has 0 with --eval_every 1; give the stage more steps"),
    ],
)
def test_a_plateau_that_could_not_be_seen_is_refused(stages: str, every: int, part: str) -> None:
    """Warm-up takes 50 steps; the evaluation at a stage's last step is its end."""
    with pytest.raises(UserError, match=part):
        steps("plateau:1", stages, eval_every=every)
    assert steps("plateau:1", "2:95,4:100", eval_every=3) == [95, 100]


def train(folder: str, output: str, *options: str, cut: int = 0, made_up: bool = False) -> None:
    """A run of three stages; stopped after step `cut` and resumed."""
    from ds_stacking.training.run import pretrain

    arguments = [*small_options(Path(folder)), f"--output_dir={folder}/{output}", "--tracking=none", "--resume=auto"]
    config = parse_run([*arguments, "--eval_every=0", "--eval_after_growth=0", *options])
    runs: list[tuple[Any, dict[str, Any]]] = []

    def prepare(run: Any, cut: int = 0) -> None:
        runs.append((run, run.config.to_dict()))
        if made_up:
            run.evaluation.held_out_loss = lambda **_: HeldOutLoss(
                all_positions=made_up_loss(run.state.position.step), masked=1.0
            )
        if cut:
            stop_at(cut)(run)

    if cut:
        with pytest.raises(RunAgain):
            pretrain(config, on_built=partial(prepare, cut=cut))
    pretrain(config, on_built=prepare)
    assert all(run.config.to_dict() == before for run, before in runs), "a run leaves its configuration as it was"


def case(folder: str) -> None:
    train(folder, "trial", f"--trigger={TRIAL}")
    chosen = [growth["operator"] for growth in json.loads(Path(folder, "trial/summary.json").read_text())["growths"]]
    stages = [
        {"layers": 1, "steps": 8},
        *({"layers": 2 * i, "steps": 8, "operator": o} for i, o in enumerate(chosen, 1)),
    ]
    train(folder, "chosen", f"--stages={json.dumps(stages)}")
    plateau = (f"--trigger={PLATEAU}", "--stages=1:70,2:8", "--eval_every=1", "--log_every=3", "--checkpoint_every=5")
    train(folder, "plateau", *plateau, made_up=True)
    train(folder, "cut", *plateau, cut=24, made_up=True)


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
    end = ends_at()
    assert FALLS < end < 60 and end % 3, "not where a line is due"
    assert counts == [end, 78 - end], "the run is as long as it was to be"
    assert [record["step"] for record in records(runs / "plateau", "growth")] == [end]
    lines = [record["step"] for record in records(runs / "plateau", "train")]
    assert end in lines and len(lines) == len(set(lines)), "a stage ends with a line, and no line comes twice"
    assert_equal_to_the_bit(runs / "plateau", runs / "cut")
