"""Every kind of file that the program reads, mutated by rule, before every launcher that reads it.

`make test` takes a sample of the cases, `make test-long` all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoint.signed import sign_manifest
from tests.hostile import rules
from tests.hostile.rules import Mutation
from tests.hostile.watch import changes
from tests.hostile.world import PREPARE, World, pretrain

SAMPLE, MOST = 80, int(os.environ.get("HOSTILE_EVERY", 24))
"""`make test` and `make test-long` run one case of so many; HOSTILE_EVERY=1 runs all."""
PLAN = ("plan.py", "--gpu=h100", "--gpus_per_node=1")
MAPS = ("analyze_attention.py", "--output_dir=maps", "--sequence_length=32")
TUNE = (
    "finetune_glue.py",
    "--output_dir=scores",
    "--tasks=RTE",
    "--seeds=1",
    "--epochs=1",
    "--batch_size=16",
    "--max_length=32",
    "--deepspeed_config=default.json",
)
Command = tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """Files that are read in one way."""

    paths: tuple[str, ...]
    """The files, or folders, relative to the working directory; a pattern's first match."""
    commands: tuple[Command, ...]
    """Launchers that read them."""
    form: str = "json"
    """`json`, `lines`, `text`, `binary` or `folder`: which rules fit."""
    signed: bool = False
    """A file of a checkpoint, which gets a manifest that agrees with it."""


def run_of(output: str, *options: str) -> Command:
    return ("pretrain.py", *pretrain(output), *options)


def on(data: str, *options: str) -> Command:
    return ("pretrain.py", *pretrain("new", data), *options)


RESUME = run_of("run", "--resume=auto")
GROW_RUN = ("grow_checkpoint.py", "run", "grown", "--to_layers=8")
GROW_MODEL = ("grow_checkpoint.py", "model", "grown", "--to_layers=8")
NEWEST = "run/checkpoints/step-5*"
TEXTS = tuple(f"formats/{name}" for name in ("a.txt", "a.jsonl", "a.xml"))
PACKED = tuple(f"formats/{name}" for name in ("b.jsonl.gz", "b.txt.bz2", "b.jsonl.zst", "a.parquet"))
ARRAYS = ("prepared/shard-00000/train.bin", "prepared/shard-00000/train_offsets.npy", "prepared/shard-00000/eval.bin")

KINDS = {
    "recipe": Kind(
        ("recipe.json",),
        (
            ("pretrain.py", "--deepspeed_config=default.json", "--recipe=recipe.json", "--output_dir=new"),
            (*PLAN, "--recipe=recipe.json"),
        ),
    ),
    "DeepSpeed configuration": Kind(("ds.json",), (("pretrain.py", *pretrain("new"), "--deepspeed_config=ds.json"),)),
    "run": Kind(
        ("run/config.json", "run/saved.json"), (RESUME, ("dashboard.py", "run"), (*MAPS, "--model=run"), GROW_RUN)
    ),
    "metrics": Kind(("run/metrics.jsonl",), (RESUME, ("dashboard.py", "run")), form="lines"),
    "folders of a run": Kind(
        ("run/checkpoints", "run/export", "run/export/stage-1-1L", NEWEST), (RESUME, GROW_RUN), form="folder"
    ),
    "finished run": Kind(
        ("finished/config.json", "finished/summary.json"),
        (
            run_of("finished", "--resume=auto"),
            ("dashboard.py", "finished"),
            (*PLAN, "--recipe=recipe.json", "--run=finished"),
            (*MAPS, "--model=finished"),
            (*TUNE, "--model=finished", "--data=glue"),
        ),
    ),
    "metrics of a finished run": Kind(
        ("finished/metrics.jsonl",),
        (("dashboard.py", "finished"), (*PLAN, "--recipe=recipe.json", "--run=finished")),
        form="lines",
    ),
    "checkpoint": Kind(
        (f"{NEWEST}/manifest.json", f"{NEWEST}/state.json", f"{NEWEST}/rank-00000.json"), (RESUME, GROW_RUN)
    ),
    "checkpoint signed anew": Kind(
        (f"{NEWEST}/state.json", f"{NEWEST}/rank-00000.json"), (RESUME, GROW_RUN), signed=True
    ),
    "tensors signed anew": Kind(
        (f"{NEWEST}/rank-00000.safetensors", f"{NEWEST}/pieces.safetensors"),
        (RESUME, GROW_RUN),
        form="binary",
        signed=True,
    ),
    "prepared folder": Kind(
        ("prepared/manifest.json", "prepared/preparation.json", "prepared/shard-00000/manifest.json"),
        (on("prepared"), ("prepare_data.py", "--data=corpus", "--output_dir=prepared", *PREPARE)),
    ),
    "arrays of a prepared folder": Kind(
        ARRAYS,
        (on("prepared"), ("prepare_data.py", "--data=corpus", "--output_dir=prepared", *PREPARE)),
        form="binary",
    ),
    "folders of prepared data": Kind(
        ("prepared/shard-00000", "prepared/tokenizer", "prepared"),
        (on("prepared"), on("mixture.json")),
        form="folder",
    ),
    "mixture": Kind(("mixture.json",), (on("mixture.json"),)),
    "tokenizer": Kind(
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        (
            on("corpus", "--tokenizer=tokenizer"),
            ("prepare_data.py", "--data=corpus", "--output_dir=fresh", "--tokenizer=tokenizer", *PREPARE),
        ),
    ),
    "model": Kind(
        ("model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"),
        (GROW_MODEL, (*MAPS, "--model=model"), (*TUNE, "--model=model", "--data=glue")),
    ),
    "weights": Kind(
        ("model/model.safetensors",),
        (GROW_MODEL, (*MAPS, "--model=model"), (*TUNE, "--model=model", "--data=glue")),
        form="binary",
    ),
    "comparison": Kind(("comparison/comparison.json",), (("compare.py", "--report_only", "--output_dir=comparison"),)),
    "run of a comparison": Kind(
        ("comparison/stack/flops/seed-1/summary.json",), (("compare.py", "--report_only", "--output_dir=comparison"),)
    ),
    "metrics of a comparison": Kind(
        ("comparison/stack/flops/seed-1/metrics.jsonl",),
        (("compare.py", "--report_only", "--output_dir=comparison"),),
        form="lines",
    ),
    "GLUE table": Kind(
        ("glue/RTE/train.tsv", "glue/RTE/dev.tsv"), ((*TUNE, "--model=model", "--data=glue"),), "lines"
    ),
    "text": Kind(TEXTS, (), form="lines"),
    "packed text": Kind(PACKED, (), form="binary"),
}


def commands_for(kind: Kind, path: str) -> tuple[Command, ...]:
    """The launchers of a kind; texts are named themselves."""
    if kind.commands:
        return kind.commands
    prepare = ("prepare_data.py", f"--data={path}", "--output_dir=fresh", *PREPARE)
    return (prepare, ("pretrain.py", *pretrain("new", path)))


CASES = [(name, path) for name, kind in KINDS.items() for path in kind.paths]
MANY = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_sample_of_what_a_file_may_become(world: World, name: str, path: str) -> None:
    check(world, name, path, every=SAMPLE)


@pytest.mark.parametrize(("name", "path"), MANY)
def test_whatever_a_file_becomes(world: World, name: str, path: str) -> None:
    check(world, name, path, every=MOST)


def check(world: World, name: str, path: str, every: int) -> None:
    """Every mutation (or one of `every`) of a file before each of its launchers: nothing that must not happen."""
    kind = KINDS[name]
    found, tried = [], 0
    file = next(world.work.glob(path))
    cases = [(command, *mutation) for mutation in mutations_of(kind, file) for command in commands_for(kind, path)]
    for command, what, mutate in cases[len(path) % min(every, len(cases)) :: every]:
        mutate(file)
        if kind.signed:
            sign(file.parent)
        mutated = file.parent if kind.signed else file
        found += [f"{path}, {what}: {fault}" for fault in world.faults(*command, mutated=mutated)]
        world.restore()
        tried += 1
    assert tried
    assert not found, f"{len(found)} of {tried}\n" + "\n".join(found)


def mutations_of(kind: Kind, file: Path) -> list[Mutation]:
    """What is done to a file of a kind."""
    if kind.form == "folder":
        return rules.folders()
    found = rules.wholly(text=kind.form != "binary")
    if kind.form == "binary":
        return found + rules.bits(file)
    return found + (rules.in_json(file) if kind.form == "json" else rules.in_lines(file))


def sign(checkpoint: Path) -> None:
    """Write the manifest anew, so that sizes and hashes of all files are right again."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in list(manifest["files"]):
        file = checkpoint / name
        if not file.is_file() or file.is_symlink() or file.stat().st_size > 1 << 27:
            continue
        content = file.read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": sha256(content)}
    sign_manifest(checkpoint, manifest)


def sha256(content: bytes) -> str:

    return hashlib.sha256(content).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_nothing_is_found_where_nothing_is_wrong(world: World, name: str) -> None:
    """Each launcher of each kind succeeds on the pristine files: else every refusal would be the battery's own."""
    kind = KINDS[name]
    for path in kind.paths:
        for command in commands_for(kind, path):
            outcome = world.run(*command)
            assert outcome.code == 0 and not outcome.faults(), str(outcome)
            world.restore()


def test_signing_is_right(world: World) -> None:
    checkpoint = next(world.work.glob(NEWEST))
    before = world.state()
    sign(checkpoint)
    assert changes(before, world.state()) in ([], [str((checkpoint / "manifest.json").relative_to(world.root))])
    assert world.run(*RESUME).code == 0
