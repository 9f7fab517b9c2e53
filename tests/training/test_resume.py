"""A run that is cut and resumed ends as the uninterrupted one, to the bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_stacking.checkpoint.grow import grow_folder
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import OtherRankFailed, RunAgain, UserError
from ds_stacking.common.generators import capture_generators
from ds_stacking.growth.state import KINDS, TensorSlice
from tests.corpus import small_options, write_corpus
from tests.engine.tiny import replaced
from tests.ranks import run_ranks
from tests.training.faults import stop_at

pytestmark = pytest.mark.distributed

CUTS = (3, 8, 13, 16, 24)
"""In the middle of a stage, at the ends of stages (the growth is still to come), and at the very end."""


def run(
    folder: str,
    output: str,
    zero: int | str,
    cuts: tuple[int, ...],
    options: tuple[str, ...] = (),
    to_the_end: bool = True,
    on_built: Callable[[Any], None] = lambda built: None,
) -> None:
    """Train `folder`/`output`, stopped at every step of `cuts` and resumed each time."""
    from ds_stacking.training.run import pretrain

    arguments = [
        *small_options(Path(folder)),
        f"--output_dir={folder}/{output}",
        f"--deepspeed_config=ds_configs/zero{zero}.json",
        "--log_every=2",
        "--tracking=none",
        "--resume=auto",
        *options,
    ]
    for cut in (*cuts, None) if to_the_end else cuts:

        def prepare(built: Any, cut: int | None = cut) -> None:
            on_built(built)
            if cut is not None:
                stop_at(cut)(built)

        torch.manual_seed(99)  # a new process would not have the generators of the old one
        random.seed(99)
        try:
            pretrain(parse_run(arguments), on_built=prepare)
            assert cut is None
        except RunAgain as stopped:
            assert f"at step {cut}, saved" in str(stopped)


def final(folder: Path) -> CheckpointReader:
    return CheckpointReader(max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records without what the clock decides."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = (
        *("seconds", "training_seconds", "cpu_seconds", "tokens_per_second", "flops_per_second"),
        *("seconds_growth", "seconds_by_phase"),
    )
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def assert_equal_to_the_bit(one: Path, other: Path) -> None:
    assert_same_state(one, other)
    assert metrics(one) == metrics(other)


def assert_same_state(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.parameters == second.parameters and first.extra["position"] == second.extra["position"]
    for name, info in first.parameters.items():
        for kind in KINDS:
            piece = TensorSlice(name, 0, info.numel)
            assert torch.equal(first.read(piece, kind), second.read(piece, kind)), (name, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "corpus")
    return folder


def whole_run(folder: Path, zero_stage: int) -> Path:
    """The run that nothing cuts, made once for all tests of this file that compare with it, whichever is the first."""
    whole = folder / f"whole-{zero_stage}"
    if not (whole / "summary.json").exists():
        run_ranks(2, run, str(folder), whole.name, zero_stage, ())
    return whole


@pytest.mark.parametrize("zero_stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))])
def test_a_cut_run_ends_as_the_whole_one(folder: Path, zero_stage: int) -> None:
    cut = f"cut-{zero_stage}"
    run_ranks(2, run, str(folder), cut, zero_stage, CUTS)
    assert_equal_to_the_bit(whole_run(folder, zero_stage), folder / cut)
    assert json.loads((folder / cut / "summary.json").read_text())["finished"] is True


@pytest.mark.slow
def test_under_offload_it_ends_as_good_as_the_same(folder: Path) -> None:
    """The state that moves into a new DeepSpeedCPUAdam is the same to the bit; its steps then differ in last bits."""
    run_ranks(2, run, str(folder), "whole-offload", "2_offload", ())
    run_ranks(2, run, str(folder), "cut-offload", "2_offload", (3, 13))
    whole, cut = final(folder / "whole-offload"), final(folder / "cut-offload")
    for name, info in whole.parameters.items():
        piece = TensorSlice(name, 0, info.numel)
        torch.testing.assert_close(cut.read(piece, "master"), whole.read(piece, "master"), atol=1e-5, rtol=1e-5)
    losses = [
        [line["loss"] for line in metrics(folder / name) if line["kind"] == "train"]
        for name in ("whole-offload", "cut-offload")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_generators_that_are_not_restored_are_noticed(folder: Path) -> None:
    run_ranks(2, run_without_generators, str(folder))
    whole = whole_run(folder, 2)
    with pytest.raises(AssertionError):
        assert_equal_to_the_bit(whole, folder / "faulty")


def run_without_generators(folder: str) -> None:
    with replaced(CheckpointReader, "generators", lambda *_: capture_generators()):
        run(folder, "faulty", 2, (3,))


def test_another_world_size_and_zero_stage_go_on(folder: Path) -> None:
    """2 ranks under ZeRO-2, then 1 under ZeRO-3, then 2 under ZeRO-1; without dropout the losses are the same."""
    plain = ("--model.dropout=0", "--model.attention_dropout=0")
    run_ranks(2, run, str(folder), "steady", 2, (), plain)
    run_ranks(2, run, str(folder), "moving", 2, (5,), plain, False)
    run_ranks(1, run, str(folder), "moving", 3, (12,), plain, False)
    run_ranks(2, run, str(folder), "moving", 1, (), plain)
    expected, found = (
        [record["loss"] for record in metrics(folder / name) if record["kind"] == "train"]
        for name in ("steady", "moving")
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_grown_on_the_disk_goes_on_as_the_run_that_grew(folder: Path) -> None:
    whole_run(folder, 2)
    grow_folder(folder / "whole-2" / "checkpoints" / "step-8", folder / "grown", operator="stack", layers=2)
    run_ranks(2, run, str(folder), "from-disk", 2, (), (f"--resume={folder}/grown",))
    assert_same_state(folder / "whole-2", folder / "from-disk")
    whole, grown = (json.loads((folder / name / "summary.json").read_text()) for name in ("whole-2", "from-disk"))
    for name in ("layers", "steps", "tokens", "flops", "train_loss_end", "eval_loss_end"):
        assert [stage[name] for stage in grown["stages"]] == [stage[name] for stage in whole["stages"]], name
    for name in ("layer_map", "stage", "observations", "eval_loss_later"):
        assert [growth[name] for growth in grown["growths"]] == [growth[name] for growth in whole["growths"]], name


def test_a_branch_ends_as_the_run_that_was_whole(folder: Path) -> None:
    """With the trunk's recipe it ends as the trunk, with another operator as a whole run with that one."""
    whole_run(folder, 2)
    branch = (f"--branch_from={folder}/whole-2/checkpoints/step-8",)
    other = ("--operator=last", "--optimizer_state=reset", "--eval_sequences=16")
    run_ranks(2, run, str(folder), "same", 2, (13,), branch)  # stopped and resumed too
    run_ranks(2, run, str(folder), "other", 2, (), (*branch, *other))
    run_ranks(2, run, str(folder), "whole-other", 2, (), other)
    assert_same_state(folder / "whole-2", folder / "same")
    assert_same_state(folder / "whole-other", folder / "other")
    with pytest.raises(AssertionError):
        assert_same_state(folder / "whole-2", folder / "other")
    for whole, branched in (("whole-2", "same"), ("whole-other", "other")):
        one, two = (json.loads((folder / name / "summary.json").read_text()) for name in (whole, branched))
        for name in ("eval_loss", "tokens", "flops", "steps"):
            assert one[name] == two[name], name
        losses = [[growth["eval_loss_before"] for growth in summary["growths"]] for summary in (one, two)]
        assert losses[0] == losses[1], "of the branch's own blocks"
        assert min(record["step"] for record in metrics(folder / branched)) >= 8


def test_a_branch_may_prolong_its_stage_and_not_undo_it(folder: Path) -> None:
    whole_run(folder, 2)
    branch = f"--branch_from={folder}/whole-2/checkpoints/step-8"
    run_ranks(1, run, str(folder), "longer", 0, (), (branch, "--stages=1:11"))
    assert [record["step"] for record in metrics(folder / "longer") if record["kind"] == "train"] == [10, 11]
    for option, said in (("--stages=1:7", "has made 8 steps of stage 1"), ("--model.num_heads=4", "model.num_heads")):
        message = run_ranks(1, refused, str(folder), (branch, option, f"--output_dir={folder}/none"))[0]
        assert said in message
    assert not (folder / "none").exists()


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(folder: Path) -> None:
    whole_run(folder, 2)
    before = (folder / "whole-2" / "summary.json").read_bytes()
    assert any("finished" in line for line in run_ranks(1, run_again, str(folder), "whole-2")[0])
    assert (folder / "whole-2" / "summary.json").read_bytes() == before
    (folder / "whole-2" / "summary.json").unlink()
    message = run_ranks(1, refused, str(folder), ("--seed=5", "--operator=last"))[0]
    assert "seed is 1 there and 5 here" in message and 'operator is "stack" there' in message
    assert "--branch_from begins a new run" in message
    grow_folder(folder / "whole-2" / "checkpoints" / "step-8", folder / "too-deep", operator="stack", layers=3)
    message = run_ranks(1, refused, str(folder), (f"--resume={folder}/too-deep", f"--output_dir={folder}/deep"))[0]
    assert "has 3 layers" in message and "have 1, 2, 4 layers" in message
    assert not (folder / "deep").exists()


@pytest.mark.parametrize("lost", ["gone", "empty", "a dangling link", "a file"])
def test_a_run_whose_checkpoints_are_lost_is_not_started_afresh(folder: Path, lost: str) -> None:
    whole = whole_run(folder, 2)
    (whole / "summary.json").unlink(missing_ok=True)
    checkpoints, elsewhere = whole / "checkpoints", folder / "elsewhere"
    checkpoints.rename(elsewhere)
    if lost == "empty":
        checkpoints.mkdir()
    elif lost == "a dangling link":
        checkpoints.symlink_to(folder / "scratch")
    elif lost == "a file":
        checkpoints.write_text("")
    before = {path: path.lstat().st_mtime_ns for path in whole.rglob("*") if ".owner" not in path.parts}
    message = run_ranks(1, refused, str(folder), ())[0]
    said = {"gone": "is gone", "empty": "has none", "a file": "is no folder", "a dangling link": "is a link to"}[lost]
    assert said in message
    if lost != "a dangling link":
        assert "saved step-24, but" in message and "--overwrite in the place of --resume" in message
    assert before == {path: path.lstat().st_mtime_ns for path in whole.rglob("*") if ".owner" not in path.parts}
    checkpoints.rmdir() if lost == "empty" else checkpoints.unlink(missing_ok=True)
    elsewhere.rename(checkpoints)


def test_a_finished_run_with_other_settings_is_no_success(folder: Path) -> None:
    whole_run(folder, 2)
    message = run_ranks(1, refused, str(folder), ("--seed=5", "--model.num_heads=4", "--lr=1", "--log_every=7"))[0]
    assert "holds a finished run with other settings (model.num_heads 2 -> 4, seed 1 -> 5)" in message.replace(
        "seed 1 -> 5, model.num_heads 2 -> 4", "model.num_heads 2 -> 4, seed 1 -> 5"
    )
    message = run_ranks(1, refused, str(folder), ("--stages=1:8,2:8,4:9",))[0]
    assert "stages[2].steps 8 -> 9" in message


def without_a_disk(folder: str, fault: str) -> list[str]:
    """A run whose exports or whose saves fail, and then, with the disk mended, the same command."""
    from ds_stacking.checkpoint.job import SaveJob

    def export_fails(built: Any) -> None:
        built.export = lambda stage: full

    def write_fails(*_: Any) -> None:
        raise full

    full, said = OSError(28, "No space left on device"), []
    cuts = (5,) if fault == "save" else ()
    with replaced(SaveJob, "write_share", write_fails) if fault == "save" else nullcontext():
        try:
            on_built = export_fails if fault == "export" else (lambda built: None)
            run(folder, fault, 2, cuts, (), fault == "export", on_built)
        except (OSError, OtherRankFailed, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    said.append(" ".join(sorted(path.name for path in (Path(folder) / fault / "checkpoints").glob("step-*"))))
    run(folder, fault, 2, ())
    return said


@pytest.mark.parametrize(
    ("fault", "said", "saved"),
    [
        ("export", "OSError: [Errno 28] No space left on device", "step-8"),
        (
            "save",
            "RunFailed: stopped by the test at step 5, but the last checkpoint could not be saved; "
            "go on with --resume auto",
            "",
        ),
    ],
)
def test_a_disk_that_is_full_costs_no_step_that_could_be_saved(
    folder: Path, fault: str, said: str, saved: str
) -> None:
    """An export that fails loses nothing; a stop without a checkpoint is an error and not "run me again"."""
    (found,) = run_ranks(1, without_a_disk, str(folder), fault)
    assert found == [said, saved]
    summary = json.loads((folder / fault / "summary.json").read_bytes())
    assert summary["finished"] and summary["steps"] == 24
    assert {path.name for path in (folder / fault / "export").iterdir()} == {
        *("stage-1-1L", "stage-2-2L", "stage-3-4L", "final")
    }


def test_a_resumption_at_the_very_end_exports_into_its_own_directory(folder: Path) -> None:
    whole_run(folder, 2)
    end = f"--resume={folder}/whole-2/checkpoints/step-24"
    run_ranks(1, run, str(folder), "ended", 2, (), (end,))
    assert (folder / "ended" / "export" / "final" / "model.safetensors").is_file()
    assert json.loads((folder / "ended" / "summary.json").read_bytes())["finished"]


def run_again(folder: str, output: str) -> list[str]:
    from ds_stacking.training.progress import Console
    from ds_stacking.training.run import pretrain

    said: list[str] = []
    console = Console()
    console.log = said.append
    arguments = [*small_options(Path(folder)), f"--output_dir={folder}/{output}", "--resume=auto"]
    pretrain(parse_run(arguments), console=console)
    return said


def refused(folder: str, options: tuple[str, ...]) -> str:
    with pytest.raises(UserError) as error:
        run(folder, "whole-2", 2, (), options)
    return str(error.value)
