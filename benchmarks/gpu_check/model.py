"""python -m benchmarks.gpu_check.model [--dry] [--minutes 8]

Training steps of BERT-base and BERT-large in a ZeRO-2 engine on one GPU: tokens/s, MFU and peak memory of our model,
eager and compiled, beside transformers' in the same engine and beside a bare PyTorch loop, at every depth of
stacking. `gpu_check_model.json` goes to the folder in the environment variable OUT (default benchmarks/results) after
every case. `--dry` runs it on a CPU with tiny shapes, the kernels' references and no compiled contenders, which
take minutes there: it proves the logic, its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Case
from benchmarks.throughput import compare
from ds_stacking.config import ModelConfig
from ds_stacking.engine.factory import init_distributed

EVERY = ("ours", "ours compiled", "peer", "peer compiled")
MICRO_BATCH, STEP = 32_768, 262_144
"""Tokens of a micro-batch and of an optimizer step."""


@dataclass(kw_only=True)
class Goal:
    """What ours has to reach: tokens/s, or the peer's time divided by ours. Beneath `must` lies the floor."""

    against: str
    """A contender, or "tokens/s", or "memory" (our bytes divided by the eager peer's; less is better)."""
    floor: float
    must: float


@dataclass(kw_only=True)
class Check:
    """A case with its contenders and goals."""

    name: str
    size: str
    layers: int
    length: int
    contenders: tuple[str, ...] = EVERY
    padded: bool = False
    goals: list[Goal] = field(default_factory=list)


RATIOS = [
    Goal(against="peer", floor=1.8, must=2.5),
    Goal(against="peer compiled", floor=1.2, must=1.5),
    Goal(against="memory", floor=0.6, must=0.45),
]


def _full(size: str, layers: int, length: int, floor: float, must: float) -> Check:
    goals = [Goal(against="tokens/s", floor=floor, must=must), *RATIOS]
    return Check(name=f"{size} S={length}", size=size, layers=layers, length=length, goals=goals)


def checks() -> Iterator[Check]:
    """In the order of their weight, for the case that time runs out."""
    yield _full("base", 12, 128, 500e3, 700e3)
    yield _full("base", 12, 512, 450e3, 620e3)
    yield Check(
        name="base S=128, engine against a bare loop", size="base", layers=12, length=128, contenders=("ours", "bare"),
        goals=[Goal(against="bare", floor=0.95, must=0.95)],
    )  # fmt: skip
    yield Check(
        name="base S=512, documents of 8 to 512 tokens", size="base", layers=12, length=512, padded=True,
        contenders=("ours", "peer"), goals=[Goal(against="peer", floor=1.7 * 1.8, must=1.9 * 2.5)],
    )  # fmt: skip
    yield _full("large", 24, 128, 170e3, 230e3)
    yield _full("large", 24, 512, 150e3, 210e3)
    for layers in (3, 6):
        for length in (128, 512):
            yield Check(name=f"base, {layers} layers, S={length}", size="base", layers=layers, length=length)


def case_of(check: Check, *, dry: bool) -> Case:
    """The check's model and batch; tiny in a dry run, with the same contenders."""
    width = {"base": 768, "large": 1024}[check.size]
    length = 16 if dry else check.length
    model = ModelConfig(
        hidden_size=32 if dry else width,
        num_heads=1 if dry else width // 64,
        vocab_size=96 if dry else 30_528,
        norm="post",
        dropout=0.1,
        attention_dropout=0.1,
        max_positions=length,
    )
    return Case(
        model=model,
        layers=1 if dry else check.layers,
        sequences=2 if dry else MICRO_BATCH // length,
        length=length,
        accumulation=2 if dry else STEP // MICRO_BATCH,
        bf16=not dry,
        fused=True,
        padded=check.padded,
    )


def verdicts(check: Check, found: dict[str, Any]) -> list[str]:
    """One line per goal. Our best contender counts, eager or compiled."""
    ours = [found[name] for name in ("ours", "ours compiled") if "seconds" in found.get(name, {})]
    if not ours:
        return ["    ours did not run"]
    best = min(ours, key=lambda entry: entry["seconds"])
    lines = []
    for goal in check.goals:
        value = _value(goal.against, best, found)
        if value is None:
            lines.append(f"    {goal.against}: absent")
            continue
        sign = -1 if goal.against == "memory" else 1
        state = (
            "must" if sign * value >= sign * goal.must else "floor" if sign * value >= sign * goal.floor else "MISSED"
        )
        lines.append(f"    {goal.against}: {value:,.2f} (floor {goal.floor:,g}, must {goal.must:,g}) {state}")
    return lines


def _value(against: str, best: dict[str, Any], found: dict[str, Any]) -> float | None:
    if against == "tokens/s":
        return best["tokens_per_second"]
    peer = found.get("peer" if against == "memory" else against, {})
    if against == "memory":
        return best["bytes"] / peer["bytes"] if peer.get("bytes") else None
    return peer["seconds"] / best["seconds"] if "seconds" in peer else None


def run(out: Path, *, dry: bool, minutes: float) -> list[str]:
    """All checks that begin within `minutes`; the lines of the report."""
    deadline, report, lines = time.monotonic() + 60 * minutes, {}, []
    for check in checks():
        if time.monotonic() > deadline:
            lines.append(f"out of time before: {check.name}")
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's
            contenders = [name for name in check.contenders if not (dry and "compiled" in name)]
            found = compare(case_of(check, dry=dry), contenders, repeats=1 if dry else 7)
        if not dry:
            torch.cuda.empty_cache()
        report[check.name] = found
        (out / "gpu_check_model.json").write_text(json.dumps(report, indent=1) + "\n")
        lines.append(check.name)
        lines += [f"    {name}: {json.dumps(entry)}" for name, entry in found.items()]
        lines += [line + " (dry run)" * dry for line in verdicts(check, found)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 however fast, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no case after this time")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("No GPU is visible to torch; use --dry to run the logic on a CPU.")
        return 2
    out = Path(os.environ.get("OUT", "benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        init_distributed()
    print("\n".join(run(out, dry=options.dry, minutes=options.minutes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
