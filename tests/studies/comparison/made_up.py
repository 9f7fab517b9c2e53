"""Made-up comparisons for the tests of what reads them: losses that are given, costs and files like real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Loss = Callable[[str, float, int], float]
"""Loss of an arm that has spent so many units of FLOPs, with a seed."""

UNIT = 5e12
"""FLOPs."""
TOKENS = {1: 1.31e6 / 0.21, 2: 1.31e6 / 0.47, 4: 1.31e6}
"""Tokens that a unit buys at each depth."""
SECONDS = {1: 125.0, 2: 112.0, 4: 121.0}
"""Seconds that it takes."""


def arm(kind: str, depths: Sequence[int], baseline: str | None, **others: Any) -> dict[str, Any]:
    return {"kind": kind, "meaning": kind, "depths": list(depths), "baseline": baseline, "lr": 0.002} | others


ARMS = {
    "scratch": arm("scratch", [4], None),
    "shallow_1": arm("shallow", [1], "scratch"),
    "shallow_2": arm("shallow", [2], "scratch"),
    "stack": arm("grown", [1, 2, 4], "scratch"),
}


def plan(
    arms: Mapping[str, Any] = ARMS,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    budgets: Sequence[float] = (0.5, 0.7, 1.0, 1.4),
    timed: Sequence[str] = (),
    tuned: Mapping[str, Sequence[float]] = {},
) -> dict[str, Any]:
    """A comparison.json; `timed` arms have runs of equal time too, `tuned` ones the rates that are given."""
    runs: dict[str, list[list[int]]] = {}
    for seed in seeds:
        for name, made in arms.items():
            labels = [f"x{b:g}" for b in budgets] if made["kind"] == "scratch" else ["flops"]
            for label in labels + ["time"] * (name in timed):
                units = float(label[1:]) if label[0] == "x" else 1.07 if label == "time" else 1.0
                runs[f"{name}/{label}/seed-{seed}"] = _stages(made["depths"], units)
    for name, rates in tuned.items():
        for rate in rates:
            runs[f"{name}/lr{rate:g}/seed-100001"] = _stages(arms[name]["depths"], 1.0)
    tuning = {
        "seeds": [100001],
        "factor": 1.5,
        "arms": {name: {"rates": list(rates), "chosen": rates[len(rates) // 2]} for name, rates in tuned.items()},
    }
    return {
        "version": 2,
        "later_commits": [],
        "minutes": None,
        "unit": 1.0,
        "overhead": 0.0,
        "commit": "c7241b8aa0123456789",
        "versions": {"torch": "2.11.0", "deepspeed": "0.18.2"},
        "recipe": {
            "stages": [{"layers": d, "steps": 100 * d} for d in (1, 2, 4)],
            "model": {"hidden_size": 128},
            "data": "docs",
        },
        "clock": "cpu",
        "parallel": 1,
        "data_fingerprint": "abc",
        "budgets": list(budgets),
        "seeds": list(seeds),
        "added_seeds": [],
        "costs": {},
        "arms": dict(arms),
        "tuning": tuning if tuned else None,
        "runs": runs,
    }


def _stages(depths: Sequence[int], units: float) -> list[list[int]]:
    return [[depth, round(640 * units / len(depths) * TOKENS[depth] / TOKENS[4])] for depth in depths]


def end(made: Mapping[str, Any], path: str, loss: Loss) -> dict[str, Any]:
    """The summary.json of a run of a plan."""
    name, label, seed = path.split("/")
    units = float(label[1:]) if label[0] == "x" else 1.07 if label == "time" else 1.0
    depths = made["arms"][name]["depths"]
    tokens = units * sum(TOKENS[depth] for depth in depths) / len(depths)
    seconds = units * sum(SECONDS[depth] for depth in depths) / len(depths)
    rate = abs(math.log(float(label[2:]) / made["arms"][name]["lr"])) if label.startswith("lr") else 0.0
    return {
        "finished": True,
        "eval_loss_masked": loss(name, units, int(seed.split("-")[1])) + 0.1 * rate,
        "eval_loss_shuffled": 6.3,
        "unigram_cross_entropy": 6.14,
        "cache_loss": 5.3,
        "steps": sum(steps for _, steps in made["runs"][path]),
        "tokens": round(tokens),
        "flops": units * UNIT,
        "training_seconds": 1.4 * seconds,
        "cpu_seconds": seconds,
        "data_fingerprint": "abc",
    }


def write(folder: Path, made: Mapping[str, Any] | None = None, loss: Loss | None = None) -> Path:
    """A comparison of which every run has finished."""
    made, loss = made or plan(), loss or falling
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps(made))
    for path in made["runs"]:
        run, summary = folder / path, end(made, path, loss)
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _evaluations(summary)))
    return folder


def falling(name: str, units: float, seed: int) -> float:
    """Scratch's losses are linear in the logarithm of the cost; stack reaches them with SPEED times less."""
    speed = {"stack": SPEED[seed], "shallow_1": 0.6, "shallow_2": 0.8}.get(name, 1.0) if seed in SPEED else 1.0
    wobble = 0.01 * math.sin(17.0 * seed) if name.startswith("shallow") else 0.0
    return 5.8 + 0.01 * seed - 0.5 * math.log(units * speed) + wobble


SPEED = {1: 1.25, 2: 1.3, 3: 1.2, 4: 1.28, 5: 1.22}
"""By seed: how many times the FLOPs scratch needs for the loss of `stack`."""


def _evaluations(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    amounts = ("tokens", "flops", "training_seconds", "cpu_seconds")
    return [
        {"kind": "eval", "step": i, "seconds": i, **{name: summary[name] * i / 10 for name in amounts}}
        | {"eval_loss_masked": summary["eval_loss_masked"] + 0.9 * (1 - i / 10) + 1.5 * math.exp(-i)}
        for i in range(1, 11)
    ]


def change(path: Path, **fields: Any) -> None:
    """Give fields of a JSON file other values; `...` takes one away."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
