"""Every fault at every point: the run goes on and ends as the one that nothing happened to, to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_stacking.checkpoint.select import newest_valid
from tests.corpus import write_corpus
from tests.training.faults import Ranks
from tests.training.test_resume import assert_equal_to_the_bit

pytestmark = pytest.mark.distributed

POINTS = [f"{when} {what}" for what in ("step", "evaluation", "growth", "save") for when in ("before", "in", "after")]
DEATH, STOP, NOTHING = {"failed", "killed"}, {"run again"}, {"finished"}

CASES: list[tuple[str, str, set[str]]] = [
    *((point, "SIGKILL of rank 1", DEATH) for point in POINTS),
    *((f"in {what}", "SIGKILL of all", DEATH) for what in ("step", "growth", "save")),
    *((f"in {what}", "SIGTERM to rank 1", STOP) for what in ("step", "evaluation", "growth", "save")),
    ("in save", "full disk", NOTHING),
    ("in step", "hang", DEATH),
]
"""Where, what, and how ranks may end."""
QUICK = [
    *((f"in {what}", "SIGKILL of rank 1") for what in ("step", "growth", "save")),
    *(
        ("in save", "full disk"),
        ("in step", "hang"),
    ),
]
"""Those of make test; the others are make test-long."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus")
    assert set(Ranks(str(folder), "whole").wait()) == NOTHING
    return folder


@pytest.mark.parametrize(
    ("point", "fault", "end"),
    [
        pytest.param(*case, id=f"{case[1]}-{case[0]}", marks=[] if case[:2] in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_the_run_ends_as_if_nothing_had_happened(folder: Path, point: str, fault: str, end: set[str]) -> None:
    output = f"{fault}-{point}".replace(" ", "_")
    limit = 8 if fault == "hang" else 30  # a machine with other work takes long to build an engine
    # gloo tells of a death at once, but not of one while a process group is made: that is for the time limit
    ended = Ranks(str(folder), output, (f"--hang_timeout={limit}",), point, fault).wait(after_a_death=limit + 20)
    assert set(ended) <= end and ("killed" in ended) == (end == DEATH)
    assert (folder / f"{output}.1").read_text() == point, "the fault did not happen"
    if end != NOTHING:
        assert not (folder / output / "summary.json").exists()
        assert set(Ranks(str(folder), output).wait()) == NOTHING
    assert_equal_to_the_bit(folder / "whole", folder / output)
    assert json.loads((folder / output / "summary.json").read_text())["finished"] is True


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_byte, pytest.param(truncate, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["rank-00001.safetensors", pytest.param("state.json", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_passed_over(folder: Path, damage: Callable[[Path], None], file: str) -> None:
    output = f"{damage.__name__}-{file}"
    saved = ("--checkpoint_async=false",)  # else, on a slow disk, the growth may begin with one checkpoint only
    assert Ranks(str(folder), output, saved, "in growth", "SIGKILL of all").wait() == ["killed", "killed"]
    before = newest_valid(folder / output / "checkpoints")
    assert before is not None
    damage(before.path / file)
    after = newest_valid(folder / output / "checkpoints")
    assert after is not None and after.step < before.step
    assert set(Ranks(str(folder), output).wait()) == NOTHING
    assert_equal_to_the_bit(folder / "whole", folder / output)
