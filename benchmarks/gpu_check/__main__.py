"""python -m benchmarks.gpu_check [--dry] [--minutes 8]

Machine rates, correctness, compute-sanitizer, then speed beside the peers; `gpu_check.json` goes to the folder in the
environment variable OUT (default benchmarks/results) after every section, and a table is printed last. Exit code 1
where a kernel is wrong; a missed speed target is reported, not an error. `--dry` runs all of it on a CPU with the
kernels in Triton's interpreter and tiny shapes: it proves the logic, its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_check import correctness
from benchmarks.gpu_check.measure import Machine, machine, rates
from benchmarks.gpu_check.rows import SECTIONS
from ds_stacking.kernels import linear_cross_entropy
from ds_stacking.kernels.interpreter import interpreted

BLOCKS = {"ROWS": 64, "BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_P": 8, "BLOCK_T": 8, "STAGES": 1}


def environment(at: Machine) -> dict[str, str]:
    """What the figures belong to."""
    name = "CPU, interpreter" if at.dry else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%F")}


def sanitizer(at: Machine) -> str:
    """compute-sanitizer over one small case of every kernel, in a process of its own."""
    if at.dry or shutil.which("compute-sanitizer") is None:
        return "absent"
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    try:
        done = subprocess.run(
            [*command, "-m", "benchmarks.gpu_check", "--small"], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return "out of time"
    return "ok" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout[-500:]}"


def small(at: Machine) -> None:
    """What compute-sanitizer watches."""
    tiny = Machine(dry=False, rounds=1, flush=at.flush)
    tiny.size = lambda full, tiny: tiny  # type: ignore[method-assign]
    for subject in correctness.subjects(tiny):
        correctness.compare(tiny, subject)


def head_memory(at: Machine) -> dict[str, float] | str:
    """Bytes above the inputs and gradients that the fused head and the eager one take."""
    if at.dry:
        return "absent"
    h, weight = (torch.randn(n, 768, device="cuda", dtype=at.dtype, requires_grad=True) for n in (4915, 30522))
    bias = torch.zeros(30522, device="cuda", dtype=at.dtype, requires_grad=True)
    target = torch.randint(30522, (4915,), device="cuda")

    def eager(h, weight, bias, target):
        x = torch.nn.functional.linear(h, weight, bias)
        return torch.nn.functional.cross_entropy(x, target, reduction="sum")

    found = {}
    for name, function in (("ours", linear_cross_entropy), ("eager", eager)):
        torch.autograd.grad(function(h, weight, bias, target), (h, weight, bias))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(function(h, weight, bias, target), (h, weight, bias))
        kept = sum(g.numel() * g.element_size() for g in gradients)
        found[name] = float(torch.cuda.max_memory_allocated() - before - kept)
        del gradients
    return {**found, "ratio": found["ours"] / found["eager"]}


def attempt(function: Any, *args: Any) -> Any:
    """The result, or the error as text: one failure must not cost the other results."""
    try:
        return function(*args)
    except Exception as error:
        return f"FAILED {type(error).__name__}: {str(error)[:200]}"


def table(report: dict[str, Any]) -> str:
    """All of it for a reader."""
    lines = [", ".join(f"{k} {v}" for k, v in report["environment"].items())]
    lines.append(f"copy {report['copy'] / 1e12:.3f} TB/s, matmul {report['matmul'] / 1e12:.1f} TFLOP/s")
    lines.append(
        f"sanitizer: {report['sanitizer']}; compiled: {report['compiled']}; head memory: {report['head_memory']}"
    )
    for item in report["correctness"]:
        worst = max(zip(item["errors"], item["torch_errors"], strict=True), key=lambda pair: pair[0])
        lines.append(
            f"{'ok   ' if item['ok'] else 'WRONG'} {item['name']:24} error {worst[0]:.2e} torch {worst[1]:.2e}"
        )
    for row in report["rows"]:
        if isinstance(row, str):
            lines.append(row)
            continue
        times = "  ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in row["times"].items())
        share = f"  {row['share_of_limit']:.0%} of limit" if row["share_of_limit"] else ""
        lines.append(f"{row['case']:32} {times}{share}")
        for verdict in row["verdicts"]:
            value = "" if verdict["value"] is None else f"{verdict['value']:.2f} "
            lines.append(
                f"    vs {verdict['peer']}: {value}(must {verdict['must']}, goal {verdict['goal']}) {verdict['state']}"
            )
        lines += [f"    absent: {name} ({reason})" for name, reason in row["absent"].items()]
    if report["left_out"]:
        lines.append(f"out of time before: {', '.join(report['left_out'])}")
    return "\n".join(lines)


def run(at: Machine, minutes: float, out: Path) -> dict[str, Any]:
    """Everything, in order of importance; sections that do not fit into `minutes` are named."""
    deadline = time.monotonic() + 60 * minutes
    speed = rates(at)
    report: dict[str, Any] = {
        "environment": environment(at), "copy": speed.copy, "matmul": speed.matmul, "rows": [], "left_out": [],
        "correctness": [correctness.compare(at, subject) for subject in correctness.subjects(at)],
        "compiled": "absent" if at.dry else attempt(correctness.check_compiled, at),
        "head_memory": attempt(head_memory, at), "sanitizer": attempt(sanitizer, at),
    }  # fmt: skip
    for name, section in SECTIONS.items():
        if time.monotonic() > deadline:
            report["left_out"].append(name)
            continue
        found = attempt(lambda section=section: [row.result(at, speed) for row in section(at)])
        report["rows"] += [f"{name}: {found}"] if isinstance(found, str) else found
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, in the interpreter")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no section after this time")
    parser.add_argument("--small", action="store_true", help="only one small case of every kernel")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("No GPU is visible to torch; use --dry to run the logic on a CPU.")
        return 2
    at = machine(options.dry)
    if options.small:
        small(at)
        return 0
    out = Path(os.environ.get("OUT", "benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    with interpreted(**BLOCKS) if at.dry else contextlib.nullcontext():
        report = run(at, options.minutes, out)
    print(table(report))
    return 0 if all(item["ok"] for item in report["correctness"]) else 1


if __name__ == "__main__":
    sys.exit(main())
