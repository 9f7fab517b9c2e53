"""What cannot start leaves no trace and an earlier run as it was; the mended command then works in the same folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_stacking.command_line import parse_run
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

Fault = Callable[[], Any]


@contextmanager
def raising(owner: Any, name: str, error: BaseException, only_rank: int | None = None) -> Iterator[None]:
    """Inside, `owner.name` raises."""
    original = getattr(owner, name)

    def fails(*args: Any, **options: Any) -> Any:
        if only_rank is None or int(os.environ["RANK"]) == only_rank:
            raise error
        return original(*args, **options)

    setattr(owner, name, fails)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def nothing() -> Iterator[None]:
    yield


def faults() -> dict[str, tuple[Callable[[], Any], list[str]]]:
    """What goes wrong, by name: something that fails inside, or options that are wrong."""
    from ds_stacking.engine.factory import EngineFactory
    from ds_stacking.training import build
    from ds_stacking.training import run as module
    from ds_stacking.training.loop import Pretraining

    memory = torch.OutOfMemoryError("made up")
    return {
        "engine": (lambda: raising(EngineFactory, "build", AssertionError("DeepSpeed refuses")), []),
        "model": (lambda: raising(build, "make_model", memory), []),
        "checkpoints": (lambda: raising(module, "make_writer", OSError(28, "No space left")), []),
        "interrupted": (lambda: raising(Pretraining, "open_stage", KeyboardInterrupt()), []),
        "tracker": (lambda: raising(module, "make_tracker", OSError(5, "made up")), []),
        "first step": (lambda: raising(Pretraining, "train_step", memory), []),
        "trigger": (nothing, ["--trigger=gstack"]),
        "too large": (nothing, ["--model.hidden_size=600000"]),
        "too long": (nothing, ["--corpus.sequence_length=16384", "--model.max_positions=16384"]),
        "vocabulary": (nothing, ["--model.vocab_size=8"]),
    }


def start(folder: str, options: list[str]) -> str:
    """Whether a run came to its end, or the error."""
    from ds_stacking.training.run import pretrain

    common = ["--stages=1:2", "--eval_every=0", "--tracking=none", f"--output_dir={folder}/here/run"]
    if any("sequence_length" in option for option in options):
        common.append("--tokens_per_step=16384")
    try:
        pretrain(parse_run([*small_options(Path(folder)), *common, *options]))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".owner" not in path.parts
    }


def refused_and_mended(folder: str) -> dict[str, Any]:
    """By fault: the error of a start in no folder, what it left, the error where a run is to be overwritten."""
    told: dict[str, Any] = {}
    run = Path(folder) / "here" / "run"
    for name, (fault, options) in faults().items():
        with fault():
            first = start(folder, options)
        torch.distributed.barrier()
        told[name] = (first, os.path.lexists(run.parent))
        torch.distributed.barrier()
    told["mended"] = start(folder, [])
    torch.distributed.barrier()
    before = contents(run)
    for name, (fault, options) in faults().items():
        if name in ("first step", "tracker"):
            continue  # the old run is gone by then
        with fault():
            again = start(folder, [*options, "--overwrite"])
        torch.distributed.barrier()
        told[f"over {name}"] = (again, contents(run) == before)
        torch.distributed.barrier()
    told["overwritten"] = start(folder, ["--overwrite", "--seed=5"])
    return told


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_mended_command_works_after_every_refused_one(tmp_path: Path, ranks: int) -> None:
    write_corpus(tmp_path / "corpus")
    for told in run_ranks(ranks, refused_and_mended, str(tmp_path)):
        assert told.pop("mended") == told.pop("overwritten") == "finished"
        for name, (error, left) in told.items():
            assert error != "finished", name
            assert left == name.startswith("over "), (name, error)
    assert json.loads((tmp_path / "here" / "run" / "config.json").read_text())["seed"] == 5
    assert json.loads((tmp_path / "here" / "run" / "summary.json").read_text())["finished"]


def asked_to_stop_before_the_first_step(folder: str) -> list[str]:
    from ds_stacking.training.preemption import StopRequest

    told = []
    for reason in ("SIGTERM", "SIGINT"):
        with replaced_asked(StopRequest, reason):
            told.append(start(folder, []))
        torch.distributed.barrier()
    return [*told, str(os.path.lexists(Path(folder) / "here"))]


@contextmanager
def replaced_asked(owner: Any, reason: str) -> Iterator[None]:
    original = owner.asked

    def asked(self: Any) -> bool:
        self.reason = reason
        return True

    owner.asked = asked
    try:
        yield
    finally:
        owner.asked = original


def test_a_request_to_stop_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (told,) = run_ranks(1, asked_to_stop_before_the_first_step, str(tmp_path))
    assert told == [
        "RunAgain: stopped by SIGTERM before its first step; start it again",
        "KeyboardInterrupt: ",
        "False",
    ]
