"""A run directory from somebody else, with links among its own files: nothing outside is read, written or deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.hostile.rules import SECRET
from tests.hostile.test_files import GROW_RUN, MAPS, RESUME, run_of
from tests.hostile.watch import changes
from tests.hostile.world import World

OWN = (
    "config.json",
    "metrics.jsonl",
    "saved.json",
    "summary.json",
    "wandb_id.txt",
    "stop",
    "traceback-rank0.txt",
    "report",
    "report/report.html",
    "report/curves.png",
    "export",
    "export/stage-3-4L",
    "export/final",
    "checkpoints",
    "checkpoints/step-4",
    ".owner",
    ".owner/1",
    "wandb",
)
WRITERS = {
    "resume": RESUME,
    "overwrite": run_of("run", "--overwrite"),
    "dashboard": ("dashboard.py", "run"),
    "attention maps": (*MAPS[:1], "--model=run", "--output_dir=run/maps", "--sequence_length=32"),
    "growth": GROW_RUN,
}


def plant(path: Path, target: Path) -> None:
    """Put a link in the place of whatever is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("writer", ["resume", "dashboard"])
def test_links_among_a_run_s_own_files_lead_nowhere(world: World, writer: str) -> None:
    script, *options = WRITERS[writer]
    found = []
    for number, name in enumerate(OWN):
        # a file, a folder, nothing yet: what a link leads to decides what would happen
        target = world.root / "outside" / ("secret.txt", "folder", "new")[number % 3]
        plant(world.work / "run" / name, target)
        found += [f"{name} -> {target.name}: {fault}" for fault in world.faults(script, *options)]
        world.restore()
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_every_link_with_every_writer(world: World, name: str) -> None:
    """To a file; with HOSTILE_EVERY=1 also to a folder and to nothing yet."""
    found = []
    for target in ("secret.txt", "folder", "new") if os.environ.get("HOSTILE_EVERY") == "1" else ("secret.txt",):
        for script, *options in WRITERS.values():
            plant(world.work / "run" / name, world.root / "outside" / target)
            found += world.faults(script, *options)
            world.restore()
    assert not found, "\n".join(found)


def test_the_run_directory_itself_may_be_a_link(world: World) -> None:
    (world.work / "run").rename(world.work / "scratch")
    (world.work / "run").symlink_to("scratch")
    outcome = world.run(*RESUME)
    assert outcome.code == 0 and not outcome.faults(), str(outcome)
    assert (world.work / "scratch" / "summary.json").exists()


def test_the_id_of_a_wandb_run_is_an_id(world: World) -> None:
    """What a received directory calls its wandb id would be sent to a server."""
    (world.work / "run" / "wandb_id.txt").write_text(SECRET * 20 + "\nsecond line\n")
    before = world.state()
    script, *options = RESUME
    outcome = world.run(script, *options, "--tracking=wandb")
    assert outcome.code == 2 and not outcome.faults(), str(outcome)
    changed = [path for path in changes(before, world.state()) if not path.startswith(("words", "work/run/.owner"))]
    assert not changed, str(outcome)
