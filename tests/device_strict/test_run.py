"""A whole run on the double of a GPU: stages, growths, evaluations, saves, exports; stopped, resumed on more ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import MegatronBertForMaskedLM

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import RunAgain
from ds_stacking.training.run import pretrain
from tests.corpus import small_options, write_corpus
from tests.device_strict.double import strict_device
from tests.ranks import run_ranks
from tests.training.faults import stop_at

pytestmark = pytest.mark.distributed


def start(folder: str, zero: int, cut: int, precision: str, *more: str) -> tuple[str, list[str]]:
    """Train until step `cut`, or to the end; how it ended, and where the host waited for the device."""

    options = [
        *small_options(Path(folder)),
        *(f"--deepspeed_config=ds_configs/zero{zero}.json", f"--precision={precision}", "--kernels=torch"),
        *("--stages=1:6,2:6,4:6", "--tokens_per_step=768", "--log_every=3", "--tracking=none", "--resume=auto"),
        *more,
    ]
    with strict_device(dist.get_rank()) as gpu:
        try:
            pretrain(parse_run(options), on_built=stop_at(cut))
        except RunAgain:
            return "stopped", gpu.waits
    return "finished", gpu.waits


@pytest.mark.parametrize(
    ("zero", "precision", "first", "then"),
    [
        (2, "bf16", 3, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, "fp32", 4, 3), (1, "bf16", 8, 3))),
    ],
)
def test_a_run_goes_on_with_other_ranks(zero: int, precision: str, first: int, then: int, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    ended = run_ranks(first, start, str(tmp_path), zero, 8, precision)
    assert {how for how, _ in ended} == {"stopped"}
    ended = run_ranks(then, start, str(tmp_path), zero, 0, precision)
    assert {how for how, _ in ended} == {"finished"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert summary["finished"] and summary["world_size"] == then and summary["steps"] == 18
    assert all(growth["tensors_verified"] > 0 for growth in summary["growths"]) and len(summary["growths"]) == 2
    assert len(summary["growths"][1]["observations"]) == 3, "after 1, 2 and 5 steps"
    model, report = MegatronBertForMaskedLM.from_pretrained(
        tmp_path / "run" / "export" / "final", output_loading_info=True
    )
    assert not report["missing_keys"] and len(model.bert.encoder.layer) == 4


def test_micro_batches_are_measured_on_the_device(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    options = ("--micro_batch_size=auto", "--model.next_sentence=true", "--skip_above_sigma=6", "--stages=1:3,2:3")
    ended = run_ranks(3, start, str(tmp_path), 2, 0, "bf16", *options)
    assert {how for how, _ in ended} == {"finished"}


def waits_by_step(folder: str, zero: int) -> dict[int, list[str]]:
    """Where the host waited for the device from the start of each step to the end of its report."""
    found: dict[int, list[str]] = {}
    with strict_device(dist.get_rank()) as gpu:

        def prepare(run: Any) -> None:
            train_step, report = run.train_step, run.report

            def begin(batches: Any) -> None:
                gpu.waits.clear()
                train_step(batches)

            def end() -> None:
                report()
                found[run.state.position.step] = [*gpu.waits]

            run.train_step, run.report = begin, end

        options = [*small_options(Path(folder)), f"--deepspeed_config=ds_configs/zero{zero}.json", "--precision=bf16"]
        options += ["--kernels=torch", "--stages=2:12", "--log_every=4", "--eval_every=0", "--tracking=none"]
        options += ["--skip_above_sigma=6", "--tokens_per_step=1024", "--micro_batch_size=8"]
        pretrain(parse_run(options), on_built=prepare)
    return found


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_waits_for_the_device_once(zero: int, tmp_path: Path) -> None:
    """To know whether it is taken; the counts of the step before the device has long made when they are read."""
    write_corpus(tmp_path / "corpus")
    for waits in run_ranks(2, waits_by_step, str(tmp_path), zero):
        for step, where in waits.items():
            decided = [what for what in where if "in optimizers" in what]
            ours = [
                what for what in where if what.startswith("ours: ") and "event synchronized in preemption" not in what
            ]
            assert len(decided) == (0 if zero == 3 else 1), (step, where)  # in ZeRO 3 DeepSpeed asks
            assert (len(ours) > len(decided)) == (step % 4 == 0), (step, ours)
