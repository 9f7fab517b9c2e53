"""The tiles of a run, kernels in the interpreter: the same on all ranks and in a resumed run, whatever the clock."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import triton

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import OtherRankFailed, UserError
from ds_stacking.config import ModelConfig, RunConfig
from ds_stacking.data.batches import Batch
from ds_stacking.kernels import tiles as kernel_tiles
from ds_stacking.kernels._launch import Kernel, known
from ds_stacking.kernels.interpreter import interpreted
from ds_stacking.models import tiles as model_tiles
from ds_stacking.models.fused import FusedBert
from ds_stacking.training import tiles
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

attention = sys.modules["ds_stacking.kernels.attention"]  # the package gives this name to the operator
CPU = torch.device("cpu")
LENGTH = 40


def with_tiles_of_other_bits() -> Kernel:
    """Attention's forward kernel in fp32 with tiles of several widths, which give other bits; it has one there."""

    def configs(target: str, meta: dict[str, Any]) -> list[triton.Config]:
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": n}, num_warps=4, num_stages=1) for n in (64, 32, 16)]

    return replace(attention.FORWARD, configs=configs)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins and ends without choices, and has something to choose."""
    monkeypatch.setattr(attention, "FORWARD", with_tiles_of_other_bits())
    kernel_tiles.use({})
    yield
    kernel_tiles.use({})


def config(folder: str, **options: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(hidden_size=16, num_heads=1, vocab_size=50), output_dir=folder, **options)


def read(length: int, samples: np.ndarray) -> Batch:
    generator = torch.Generator().manual_seed(len(samples))
    ids = torch.randint(1, 50, (len(samples), length), generator=generator)
    positions = torch.arange(0, len(samples) * length, 7)
    return Batch(input_ids=ids, masked_positions=positions, labels=ids.flatten()[positions], is_mask=positions == 0)


class Clock:
    """Stands in for the device's: candidate `number` is the fastest."""

    def __init__(self, number: int, error: Exception | None = None, after: int = 0) -> None:
        self.number, self.error, self.after, self.asked = number, error, after, 0

    def __call__(self, runs: Sequence[Callable[[], None]]) -> list[float]:
        self.asked += 1
        if self.error is not None and self.asked > self.after:
            raise self.error
        return [abs(number - self.number) + 1.0 for number in range(len(runs))]


def settle(asked: RunConfig, compare: Clock, *sizes: int) -> list[str]:
    """What `settle_tiles` says, for micro-batches of these sizes."""
    said: list[str] = []
    with interpreted():
        tiles.settle_tiles(
            asked, [(s, LENGTH) for s in sizes or (2,)], read, CPU, torch.float32, log=said.append, compare=compare
        )
    return said


def saved(folder: str | Path) -> dict[str, dict[str, str]]:
    return json.loads(Path(folder, "tiles.json").read_text())


def gradients() -> str:
    """Digest of the gradients of a training pass, in the tiles that this process has."""
    torch.manual_seed(3)
    model = FusedBert(config("unused").model, 3).train()
    with interpreted():
        model(**read(LENGTH, np.arange(2)).inputs).loss_sum.backward()
    digest = sha256()
    for parameter in model.parameters():
        if parameter.grad is not None:
            digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()


def on_a_rank(folder: str, alone: bool) -> dict[str, Any]:
    """Settle and train; the clock of each rank prefers another candidate. `alone`: each rank decides for itself."""
    attention.FORWARD = with_tiles_of_other_bits()
    if alone:
        tiles.from_first_rank = lambda decide, exchange, **_: decide()  # type: ignore[assignment]
        folder = f"{folder}/{dist.get_rank()}"
        Path(folder).mkdir()
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    compare = Clock(2 * dist.get_rank())
    said = settle(config(folder), compare)
    (choices,) = saved(folder).values()
    return {
        "known": {key: known(key) for key in choices},
        "drawn": not torch.equal(torch.get_rng_state(), before),
        "asked": compare.asked,
        "said": len(said),
        "gradients": gradients(),
    }


@pytest.mark.distributed
def test_all_ranks_run_what_the_first_one_measured(tmp_path: Path) -> None:
    first, second = run_ranks(2, on_a_rank, str(tmp_path), False)
    assert first["asked"] > 3 and second["asked"] == 0
    assert first["known"] == second["known"] and len(first["known"]) == first["asked"]
    assert first["gradients"] == second["gradients"]
    assert not first["drawn"] and not second["drawn"]
    assert first["said"] == 1


@pytest.mark.distributed
def test_ranks_that_decide_alone_are_found_out(tmp_path: Path) -> None:
    """The comparison above sees it: other tiles give other bits."""
    first, second = run_ranks(2, on_a_rank, str(tmp_path), True)
    assert first["known"].keys() == second["known"].keys() and first["known"] != second["known"]
    assert first["gradients"] != second["gradients"]


def failing(folder: str) -> str:
    try:
        settle(config(folder), Clock(0, RuntimeError("made up")))
    except (RuntimeError, OtherRankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.distributed
def test_a_failure_of_the_first_rank_reaches_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, failing, str(tmp_path))
    assert first == "RuntimeError: made up" and second.startswith("OtherRankFailed")


def test_a_resumed_run_has_the_tiles_of_its_directory(tmp_path: Path) -> None:
    folder = str(tmp_path)
    (said,) = settle(config(folder), Clock(2))
    assert "kernel launches measured" in said
    content, bits = saved(folder), gradients()
    kernel_tiles.use({})
    assert gradients() != bits  # the predictions give other bits
    other = Clock(0)  # today another candidate would win
    assert settle(config(folder), other) == [] and other.asked == 0
    assert saved(folder) == content and gradients() == bits
    settle(config(folder, tiles="predict"), other)
    assert gradients() == bits


def test_a_larger_micro_batch_is_measured_beside_what_is_known(tmp_path: Path) -> None:
    settle(config(str(tmp_path)), Clock(2))
    (before,) = saved(tmp_path).values()
    compare = Clock(0)
    settle(config(str(tmp_path)), compare, 2, 4)
    (after,) = saved(tmp_path).values()
    assert compare.asked and len(after) == len(before) + compare.asked
    assert before.items() <= after.items()


def test_another_gpu_or_triton_measures_anew_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(config(str(tmp_path)), Clock(2))
    (here,) = saved(tmp_path)
    monkeypatch.setattr(model_tiles, "environment", lambda _: "Another GPU, Triton 9")
    changed, measured = settle(config(str(tmp_path)), Clock(0))
    assert here in changed and "Another GPU, Triton 9" in changed and "may differ" in changed
    assert "measured" in measured
    assert list(saved(tmp_path)) == [here, "Another GPU, Triton 9"]


def test_without_memory_the_predictions_stand(tmp_path: Path) -> None:
    (said,) = settle(config(str(tmp_path)), Clock(2, torch.OutOfMemoryError("made up"), after=1))
    assert "tiles of 1 kernel launches measured" in said and "memory ran out" in said
    again = Clock(2)
    assert settle(config(str(tmp_path)), again) == [] and again.asked == 0  # a resumed run must not measure either


def test_predicted_tiles_leave_nothing(tmp_path: Path) -> None:
    compare = Clock(2)
    assert settle(config(str(tmp_path), tiles="predict"), compare) == []
    assert compare.asked == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {"b": 1}}', "{"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tiles.json").write_text(content)
    with pytest.raises(UserError, match="tiles.json.* delete it, and tiles are chosen anew"):
        settle(config(str(tmp_path)), Clock(2))


def test_compiled_code_of_other_tiles_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tiles, "compile_anew", tags.append)
    settle(config(str(tmp_path / "a"), compile=True), Clock(2))
    settle(config(str(tmp_path / "b"), compile=True), Clock(0))
    settle(config(str(tmp_path / "a"), compile=True), Clock(0))
    assert len(tags) == 3 and tags[0] == tags[2] != tags[1]
    settle(config(str(tmp_path / "a")), Clock(0))
    assert len(tags) == 3


def whole_run(folder: str, candidate: int, *options: str) -> tuple[list[float], str, int]:
    """A run with kernels in the interpreter: losses, digest of its last state, and how often its clock was asked."""
    from ds_stacking.training import run

    attention.FORWARD = with_tiles_of_other_bits()
    compare = Clock(candidate)
    run.has_kernels = lambda _: True  # type: ignore[assignment]
    kernel_tiles.compare_on_device = compare
    given = [*small_options(Path(folder)), "--tracking=none", "--deepspeed_config=ds_configs/zero2.json"]
    given += ["--stages=2:4", "--tokens_per_step=64", "--micro_batch_size=2", "--eval_sequences=2", "--eval_every=0"]
    with interpreted():
        run.pretrain(parse_run([*given, "--checkpoint_every=2", "--checkpoint_async=false", *options]))
    lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    state = sha256()
    for path in sorted(Path(folder, "run/checkpoints/step-4").glob("*.safetensors")):
        state.update(path.read_bytes())
    return [line["loss"] for line in lines if line["kind"] == "train"], state.hexdigest(), compare.asked


@pytest.mark.distributed
def test_a_run_measures_once_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    """And not where its tiles are lost and the clock, today, prefers others: the comparison sees that."""
    write_corpus(tmp_path / "corpus")
    (whole, state, asked), *_ = run_ranks(1, whole_run, str(tmp_path), 2)
    assert len(whole) == 4 and asked == len(next(iter(saved(tmp_path / "run").values())))
    resume = f"--resume={tmp_path / 'run' / 'checkpoints' / 'step-2'}"
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    assert run_ranks(1, whole_run, str(tmp_path), 0, resume) == [(whole, state, 0)]
    for name in ("summary.json", "tiles.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    (_, other, asked), *_ = run_ranks(1, whole_run, str(tmp_path), 0, resume)
    assert other != state and asked
