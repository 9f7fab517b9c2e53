"""Steps that would do harm are skipped on all ranks, counted, and end the run where they do not stop."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_stacking.command_line import parse_run
from ds_stacking.training.health import LEAST, Health, Unhealthy
from ds_stacking.training.state import TrainState
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks
from tests.training.test_resume import assert_equal_to_the_bit, final, metrics, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    write_corpus(folder / "corpus")
    return folder


def disturbed(
    folder: str, output: str, zero_stage: int, disturb: Callable, options: tuple[str, ...] = ()
) -> tuple[bool, list[str]]:
    """Train with a disturbed loss; whether the run was ended as unhealthy, and what was said."""
    from ds_stacking.training.progress import Console
    from ds_stacking.training.run import pretrain

    said: list[str] = []
    console = Console()
    console.log = said.append

    def prepare(run: Any) -> None:
        loss, rank = run.loss, int(os.environ["RANK"])
        run.loss = lambda *args: disturb(run.state.position.step + 1, rank, loss(*args))

    arguments = [
        *small_options(Path(folder)),
        f"--output_dir={folder}/{output}",
        f"--deepspeed_config=ds_configs/zero{zero_stage}.json",
        "--stages=1:12,2:12",
        "--tracking=none",
        *options,
    ]
    try:
        pretrain(parse_run(arguments), console=console, on_built=prepare)
    except Unhealthy as error:
        return True, [*said, str(error)]
    return False, said


def nan_on_rank_1_in_step_5(step: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan if (step, rank) == (5, 1) else loss


def nan_on_rank_1_for_ever(step: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan if step >= 5 and rank == 1 else loss


def spike_in_step_20(step: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
    return loss * 50 if step == 20 else loss


def steps_taken(folder: Path) -> set[int]:
    return {info.step for info in final(folder).parameters.values()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("zero_stage", "options"),
    [
        (0, ()),
        (2, ()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, ("--precision=bf16",)), (1, ("--optimizer.clip=0",)), (3, ("--optimizer.clip=0",)))
        ),
    ],
)
def test_a_nan_on_one_rank_is_skipped_by_all_and_seen_on_rank_0(
    folder: Path, zero_stage: int, options: tuple[str, ...]
) -> None:
    output = f"nan-{zero_stage}{len(options)}"
    results = run_ranks(2, disturbed, str(folder), output, zero_stage, nan_on_rank_1_in_step_5, options)
    assert [ended for ended, _ in results] == [False, False]
    assert any("step 5 was skipped: its loss or gradients are not finite" in line for line in results[0][1])
    trained = [record for record in metrics(folder / output) if record["kind"] == "train"]
    assert [record["step"] for record in trained if record["loss"] is None] == [5]
    assert [record["skipped_steps"] for record in trained] == [0] * 4 + [1] * 20
    # a bf16 engine under ZeRO 0 takes an empty step when it is built
    assert steps_taken(folder / output) == {24 if "--precision=bf16" in options else 23}


@pytest.mark.distributed
def test_a_run_that_skips_step_after_step_ends_with_a_post_mortem(folder: Path) -> None:
    options = ("--max_skipped_steps=2",)
    results = run_ranks(2, disturbed, str(folder), "ended", 2, nan_on_rank_1_for_ever, options)
    for ended, said in results:
        assert ended and "3 optimizer steps in a row were skipped, the last one step 7" in said[-1]
    (path,) = (folder / "ended").glob("post_mortem*.json")
    assert str(path) in results[0][1][-1]
    report = json.loads(path.read_text())
    assert report["step"] == 7 and report["in_a_row"] == 3 and report["skipped"] == 3
    assert report["loss_by_rank"][1] is None and report["loss_by_rank"][0] > 0
    samples = [number for rank in report["samples_by_rank"] for part in rank for number in part]
    assert sorted(samples) == list(range(6 * 16, 7 * 16)), "512 tokens are 16 blocks of 32"
    assert {"blocks.0"} < set(report["norms_by_block"])
    assert all(norm["weights"] > 0 and norm["mean_gradient"] > 0 for norm in report["norms_by_block"].values())


@pytest.mark.distributed
@pytest.mark.parametrize("sigma", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_a_spike_is_skipped_where_wanted(folder: Path, sigma: int) -> None:
    options = (f"--skip_above_sigma={sigma}",)
    results = run_ranks(2, disturbed, str(folder), f"spike-{sigma}", 2, spike_in_step_20, options)
    skipped = [line for line in results[0][1] if "was skipped" in line]
    assert len(skipped) == bool(sigma) and steps_taken(folder / f"spike-{sigma}") == {24 - bool(sigma)}
    assert all("step 20 was skipped: its loss" in line and "is too high" in line for line in skipped)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_window_goes_on_after_a_resumption(folder: Path) -> None:
    """A bound so low that some steps are skipped, so that a lost window would show."""
    options = ("--skip_above_sigma=0.5", "--stages=1:16,2:24", "--lr=1e-6")
    run_ranks(2, run, str(folder), "whole", 1, (), options)
    run_ranks(2, run, str(folder), "cut", 1, (20,), options)
    assert steps_taken(folder / "whole") < set(range(40)), "nothing was skipped"
    assert_equal_to_the_bit(folder / "whole", folder / "cut")


def test_the_bound_needs_some_steps_first() -> None:
    assert run_ranks(1, bounds)[0] == [1.0] * (LEAST + 1) + [True]


def bounds() -> list[float | bool]:
    health = Health(TrainState(device=torch.device("cpu"), stage_steps=[]), limit=0, sigma=3)
    seen: list[float | bool] = []
    for loss in [5.0, 5.2] * (LEAST // 2) + [5.3, 7.0]:
        factor = float(health.factor(torch.tensor(loss, dtype=torch.float64)))
        health.count(not math.isnan(factor))
        seen.append(math.isnan(factor) or factor)
    return seen
