"""Every environment variable that the program or its libraries know, with values that no launcher sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.hostile.prison import ROOT
from tests.hostile.world import PREPARE, World, pretrain

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS",
           "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "CROSS_RANK", "CROSS_SIZE")  # fmt: skip
FOLDERS = ("HOME", "TMPDIR", "DS_STACKING_CACHE", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
OTHERS = ("MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "WANDB_MODE", "WANDB_API_KEY", "LANG", "TERM", "COLUMNS",
          "SLURM_CLUSTER_NAME", "DS_STACKING_FAILURE_FILE", "GLOO_SOCKET_IFNAME")  # fmt: skip
VALUES = {
    **dict.fromkeys(NUMBERS, ("abc", "-1", "1.5", "9" * 400, "²")),
    **dict.fromkeys(FOLDERS, ("/nonexistent/a", "/dev/null", "/proc/1", "")),
    **dict.fromkeys(OTHERS, ("", "x" * 5000, "\udcff", "a\nb")),
    "WORLD_SIZE": ("0", "abc", "-1", "2"),
}


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "DS_STACKING_CACHE"])
def test_a_variable_that_is_wrong(world: World, name: str) -> None:
    check(world, name, VALUES[name][:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_a_variable_that_is_wrong_in_any_way(world: World, name: str) -> None:
    """One value, another for each variable; with HOSTILE_EVERY=1 all of them."""
    values, at = VALUES[name], len(name) % len(VALUES[name])
    check(world, name, values if os.environ.get("HOSTILE_EVERY") == "1" else values[at : at + 1])


def check(world: World, name: str, values: tuple[str, ...]) -> None:
    found = []
    for value in values:
        for script, *options in (
            ("pretrain.py", *pretrain("new")),
            ("prepare_data.py", "--data=corpus", "--output_dir=fresh", *PREPARE),
        ):
            faults = world.faults(script, *options, **{name: value})
            found += [f"{name}={ascii(value)[:60]}: {fault}" for fault in faults]
            world.restore()
    assert not found, "\n".join(found)


@pytest.mark.parametrize("script", ["dashboard.py", "pretrain.py"])
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("good", [True, False])
def test_closed_outputs_change_no_exit_code(world: World, script: str, closed: tuple[int, ...], good: bool) -> None:
    options = {"dashboard.py": ["finished"], "pretrain.py": ["--print_config"]}[script] if good else ["--none=1"]
    outcome = world.run(script, *options, closed=closed)
    assert outcome.code == (0 if good else 2), str(outcome)
    assert "Traceback" not in outcome.err, str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DS_ACCELERATOR", "foo", "DS_ACCELERATOR"),
        ("HOME", None, None),
        ("OMP_NUM_THREADS", "x", "OMP_NUM_THREADS"),
        ("RANK", "abc", "RANK is 'abc'"),
    ],
)
def test_what_libraries_read_when_they_are_imported(
    world: World, name: str, value: str | None, words: str | None
) -> None:
    """A process of its own: those of the other tests have imported everything before."""
    environment = {key: old for key, old in os.environ.items() if key != name}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "pretrain.py"), *pretrain("new")],
        cwd=world.work,
        env=environment | ({name: value} if value is not None else {}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr
    if words is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert not (world.work / "new").exists()
