"""Stands in for pretrain.py in tests of the comparison: reads its options, writes a run directory, trains nothing.

It imports nothing of the project, since tests start it a hundred times; test_arms.py holds the options to be ones that
pretrain.py takes. FAKE_FAIL names a run that fails, FAKE_WAIT one that goes on until it is asked to stop. The loss is
lowest at the learning rate FAKE_BEST; above FAKE_DIVERGE it diverges.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = {1: 2.5, 2: 3.5, 4: 5.0}
"""Seconds of a step by depth; its FLOPs are 100 for each block."""
TOKENS = 2048


def read_options(arguments: list[str]) -> dict[str, Any]:
    """Options by name, the last of each."""
    options: dict[str, Any] = {"lr": 2e-3}
    for argument in arguments:
        name, _, text = argument.removeprefix("--").partition("=")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def main() -> int:
    config = read_options(sys.argv[1:])
    run = Path(config["output_dir"])
    assert (config.get("resume") == "auto") != ("overwrite" in config)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    name = "/".join(run.parts[-3:])
    if os.environ.get("FAKE_FAIL") in (name, run.name):
        print("error: the disk is full.", file=sys.stderr)
        return 2 if run.name == "pilot" else int(os.environ.get("FAKE_CODE", "1"))
    while os.environ.get("FAKE_WAIT") == name:
        if (run / "stop").exists():
            return 75
        time.sleep(0.02)
    assert run.name == "pilot" or config["corpus.fingerprint"] == "00c0ffee00c0ffee"
    lr = config["stages"][0]["lr"] or config["lr"]
    if lr > float(os.environ.get("FAKE_DIVERGE", "inf")):
        print("error: 11 steps in a row were skipped: its loss or gradients are not finite.", file=sys.stderr)
        return 1
    miss = math.log(lr / float(os.environ.get("FAKE_BEST", lr))) ** 2
    totals = {"step": 0, "tokens": 0, "flops": 0.0, "training_seconds": 0.0, "cpu_seconds": 0.0, "seconds": 0.0}
    records = []
    for stage in config["stages"]:
        layers = stage["layers"]
        for _ in range(stage["steps"]):
            totals["step"] += 1
            totals["tokens"] += TOKENS
            totals["flops"] += 100.0 * layers
            totals["training_seconds"] += SECONDS.get(layers, 1.0)
            totals["seconds"] = totals["training_seconds"] + 2.0
            totals["cpu_seconds"] += 2 * SECONDS.get(layers, 1.0)
            loss = 9.0 - totals["step"] / 100 + miss
            records.append({"kind": "train", "layers": layers, "loss": 3.0, **totals})
            records.append({"kind": "eval", "layers": layers, "eval_loss_masked": loss, **totals})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    end = {
        "finished": True,
        "data_fingerprint": "00c0ffee00c0ffee",
        "steps": totals["step"],
        "eval_loss_masked": records[-1]["eval_loss_masked"],
        "pinned": sorted(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    (run / "summary.json").write_text(json.dumps(totals | end))
    return 0


if __name__ == "__main__":
    sys.exit(main())
