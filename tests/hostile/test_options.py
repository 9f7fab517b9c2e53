"""Every option of every launcher, with values that nobody means: refused in one sentence, or harmless."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache

import pytest

from tests.hostile.test_files import MAPS, PLAN, TUNE
from tests.hostile.world import PREPARE, SMALL, World

SAMPLE, MOST = 150, int(os.environ.get("HOSTILE_EVERY", 30))
"""`make test` and `make test-long` run one case of so many; HOSTILE_EVERY=1 runs all."""
VALUES = (
    "",
    " ",
    "x",
    "-1",
    "0",
    "0.5",
    "nan",
    "inf",
    "-1e999",
    "1000000000000",
    "9" * 400,
    "9" * 5000,
    "²",
    "null",
    "[",
    "{}",
    "[" * 100_000,
    "a,b,,",
    "../../outside/secret.txt",
    "outside",
    "/dev/null",
    "/proc/self/mem",
    "corpus/corpus.txt/below",
    "line\nbreak",
    "<script>alert(1)</script>",
    "\udcff\udcfe",
    "x" * 5000,
    "$(touch ../outside/made)",
    "--help",
)
BASE: dict[str, tuple[str, ...]] = {
    "pretrain.py": ("--deepspeed_config=default.json", "--data=corpus", "--output_dir=new", *SMALL),
    "prepare_data.py": ("--data=corpus", "--output_dir=fresh", *PREPARE),
    "plan.py": (*PLAN[1:], "--recipe=recipe.json"),
    "grow_checkpoint.py": ("model", "grown", "--to_layers=8"),
    "analyze_attention.py": (*MAPS[1:], "--model=model"),
    "finetune_glue.py": (*TUNE[1:], "--model=model", "--data=glue"),
    "dashboard.py": ("finished",),
    "compare.py": ("--report_only", "--output_dir=comparison", "--recipe=recipe.json"),
}
"""What each launcher is started with; the option under test comes after it."""
NOT_TRIED = {"help", "print_config", "traceback", "model", "corpus", "optimizer"}
"""Options that print, and groups, whose fields are options themselves."""


@cache
def options_of(world: World, script: str) -> tuple[str, ...]:
    """The options that a launcher's help names."""
    found = re.findall(r"(?<![\w-])--([\w.-]*\w)", world.run(script, "--help").out)
    kept = {name for name in found if name not in NOT_TRIED or script in ("analyze_attention.py", "finetune_glue.py")}
    return tuple(sorted(kept - {"help"}))


@pytest.mark.parametrize("script", BASE)
def test_a_sample_of_values(world: World, script: str) -> None:
    check(world, script, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("script", BASE)
def test_whatever_is_given(world: World, script: str) -> None:
    check(world, script, MOST)


def check(world: World, script: str, every: int) -> None:
    """One of `every` pairs of an option and a value, picked by hash."""
    options = options_of(world, script)
    assert len(options) >= 3, options
    pairs = [(option, value) for option in options for value in VALUES]
    pairs.sort(key=lambda pair: hashlib.sha256("=".join(pair).encode(errors="surrogateescape")).digest())
    found = []
    for option, value in pairs[::every]:
        for fault in world.faults(script, *BASE[script], f"--{option}={value}"):
            found.append(f"--{option}={ascii(value)[:60]}: {fault}")
        world.restore()
    assert not found, f"{len(found)} of {len(pairs[::every])}\n" + "\n".join(found)


@pytest.mark.parametrize("script", BASE)
def test_options_that_nobody_knows_name_the_nearest(world: World, script: str) -> None:
    option = max(options_of(world, script), key=len)
    outcome = world.run(script, *BASE[script], f"--{option}x=1")
    assert outcome.code == 2 and not outcome.faults(), str(outcome)
    assert option in outcome.sentences[0], str(outcome)
