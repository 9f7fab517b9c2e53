"""Ways to grow, compared from common trunks: optimizer state, operator, warm-up of the new blocks, time of the growth.

python benchmarks/ablation.py --output_dir runs/ablation [--seeds 1] [--times 120,280] [options of pretrain.py]

For every seed and time of growth a model of 3 layers is trained once; every way to grow it to 6 layers branches off
from there and trains on to the same step, the learning rate then at 0. Beside them 6 layers from the first step, and 3
to the last. One process and about 50 minutes a seed on one core. Finished runs are kept: the same command goes on.
Prints Markdown tables of held-out losses on [MASK] positions, the mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

SHALLOW, DEEP, STEPS = 3, 6, 450
STATES = ("stack", "new_reset", "second_only", "reset")
OPERATORS = {"stack": "stack", "interleave": "interleave", "middle": "0,1,1,1,1,2"}
"""`middle` equals `stack` where it doubles the depth at once; here the middle block is copied three times, which is
where three growths by one block lead (MIDAS)."""
REWARM = (0, 40)
PRETRAIN = Path(__file__).parents[1] / "launchers" / "pretrain.py"
OPTIONS = (
    *("--corpus.sequence_length=32", "--corpus.masking_rate=0.3", "--micro_batch_size=64", "--lr=1e-3"),
    *("--eval_sequences=1024", "--eval_every=0", "--eval_after_growth=50", "--checkpoint_every=0", "--tracking=none"),
)
"""Short blocks and many predictions: with them a model of this size learns context in a few hundred steps."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to grow."""

    time: int
    operator: str
    state: str
    rewarm: int

    @property
    def name(self) -> str:
        """Of its runs."""
        return f"g{self.time}-{self.operator}-{self.state}-{self.rewarm}"

    @property
    def options(self) -> list[str]:
        """Of pretrain.py."""
        grown = {"layers": DEEP, "steps": STEPS - self.time, "rewarm_steps": self.rewarm}
        stages = json.dumps([{"layers": SHALLOW, "steps": self.time}, grown])
        return [f"--stages={stages}", f"--operator={OPERATORS[self.operator]}", f"--optimizer_state={self.state}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--times", default="120,280", help="optimizer steps before the growth")
    parser.add_argument("--report_only", action="store_true", help="train nothing, print what there is")
    known, more = parser.parse_known_args()
    times, seeds = [int(time) for time in known.times.split(",")], range(1, known.seeds + 1)
    for seed in () if known.report_only else seeds:
        for name, options in runs(known.output_dir, times, seed):
            train(known.output_dir / f"{name}-seed{seed}", [*OPTIONS, f"--seed={seed}", *more, *options])
    print("\n\n".join(table(losses(known.output_dir, seeds), time) for time in times))
    for name in ("scratch", "shallow"):
        print(f"\n{name}: {cell(losses(known.output_dir, seeds), name)}")


def runs(folder: Path, times: list[int], seed: int) -> Iterator[tuple[str, list[str]]]:
    """Name and options of every run of a seed; the first way of a time is the trunk of the others."""
    for time in times:
        trunk, *others = ways(time)
        yield trunk.name, trunk.options
        branch = f"--branch_from={folder / f'{trunk.name}-seed{seed}' / 'checkpoints' / f'step-{time}'}"
        yield from ((way.name, [*way.options, branch]) for way in others)
    yield "scratch", [f"--stages={DEEP}:{STEPS}"]
    yield "shallow", [f"--stages={SHALLOW}:{STEPS}"]


def ways(time: int) -> list[Way]:
    """All ways to grow at a time."""
    return [
        Way(time=time, operator=operator, state=state, rewarm=rewarm)
        for state in STATES
        for operator in OPERATORS
        for rewarm in REWARM
    ]


def train(run_dir: Path, options: list[str]) -> None:
    """One run, unless it is finished."""
    if (run_dir / "summary.json").is_file():
        return
    print(run_dir.name, flush=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PRETRAIN), *options, f"--output_dir={run_dir}", "--resume=auto"]
    with run_dir.with_suffix(".log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def losses(folder: Path, seeds: range) -> dict[str, list[float]]:
    """Final losses of the finished runs, by name."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for path in sorted(folder.glob(f"*-seed{seed}/summary.json")):
            name = path.parent.name.removesuffix(f"-seed{seed}")
            found.setdefault(name, []).append(json.loads(path.read_text())["eval_loss_masked"])
    return found


def table(found: Mapping[str, list[float]], time: int) -> str:
    """The losses of one time of growth."""
    lines = [f"| growth after {time} of {STEPS} steps | " + " | ".join(f"`{state}`" for state in STATES) + " |"]
    lines.append("|---" * (1 + len(STATES)) + "|")
    for operator in OPERATORS:
        for rewarm in REWARM:
            of_row = [way for way in ways(time) if (way.operator, way.rewarm) == (operator, rewarm)]
            cells = [cell(found, way.name) for way in of_row]
            label = f"`{operator}`" + (f", new blocks warmed up over {rewarm} steps" if rewarm else "")
            lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def cell(found: Mapping[str, list[float]], name: str) -> str:
    """A mean loss; a dash where nothing has finished."""
    return f"{mean(found[name]):.3f}" if name in found else "-"


if __name__ == "__main__":
    main()
