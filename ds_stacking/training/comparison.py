"""A comparison of arms: every arm a real pre-training run in its own directory, started one after another.

A comparison's directory holds `comparison.json` (recipe, clock, measured costs, the plan), `pilot/`, and for every run
its directory `<arm>/<label>/seed-<n>/` with what it printed in `seed-<n>.log` beside it. Called again, finished runs
stay as they are, stopped ones go on, and arms or seeds may be added.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from ds_stacking.common.errors import RunAgain, UserError
from ds_stacking.common.files import write_json, write_text
from ds_stacking.config import RunConfig
from ds_stacking.training.arms import ARMS, ArmRun, Cost, check_arms, pilot_stages, plan_arms
from ds_stacking.training.run_directory import CONFIG, METRICS, STOP, is_finished

PLAN = "comparison.json"
PILOT_STEPS = 60
"""Steps of the pilot at each depth, the first third of which is not counted."""
CLOCKS = {"wall": "training_seconds", "cpu": "cpu_seconds"}
"""The field of a record that holds the seconds of each clock."""


@dataclass(kw_only=True)
class Comparison:
    """What is compared, and how its runs are started."""

    config: RunConfig
    """The recipe that all arms share; its seed is the first."""
    options: list[str]
    """Options of pretrain.py that make it."""
    arms: Sequence[str]
    """Names of ARMS."""
    seeds: int = 3
    """Runs of every arm."""
    budgets: Sequence[float] = (0.7, 1.0, 1.4)
    """Budgets of scratch, in units of the recipe's own FLOPs."""
    clock: Literal["wall", "cpu"] = "wall"
    """What equal time means; cpu: processor time, for one rank on a CPU that others use too."""
    launch: Sequence[str]
    """The command that starts pretrain.py, up to its options."""
    say: Callable[[str], None] = print
    """Shows a line."""
    reason: str | None = field(default=None, init=False)
    """The signal that asked to stop."""

    def __post_init__(self) -> None:
        check_arms(self.config, self.arms, self.budgets)
        if self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}; it must be 1 or more.")
        self.folder = Path(self.config.run_dir)

    def run(self, task: int | None = None) -> list[str]:
        """Run everything, or only one arm with one seed (`task`, counted from 0); returns the runs that failed.

        Raises UserError for bad input of all runs, which the pilot meets first, and RunAgain when asked to stop.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._stop)
        pairs = [(arm, seed) for arm in self.arms for seed in range(self.config.seed, self.config.seed + self.seeds)]
        if task is not None and not 0 <= task < len(pairs):
            raise UserError(
                f"task {task} is not among the {len(pairs)} of {len(self.arms)} arms and {self.seeds} seeds."
            )
        wanted = pairs if task is None else [pairs[task]]
        runs = [run for run in self.plan() if (run.arm, run.seed) in wanted]
        return [run.path for run in runs if not self.train(run)]

    def plan(self) -> list[ArmRun]:
        """The runs, planned once for all that share the directory; a pilot measures what a step costs."""
        same = self.config.to_dict() | {"output_dir": None, "name": None, "tracking": None}
        same = {"recipe": same, "clock": self.clock}
        path = self.folder / PLAN
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            saved = json.loads(path.read_text()) if path.exists() else same
            if any(saved[name] != value for name, value in same.items()):
                raise UserError(f"{self.folder} holds a comparison of another recipe; choose another --output_dir.")
            costs = {int(layers): Cost(**cost) for layers, cost in saved.get("costs", {}).items()} or self.pilot()
            runs = plan_arms(self.config, self.arms, self.budgets, self.seeds, costs)
            planned = {run.path: [[stage.layers, stage.steps] for stage in run.stages] for run in runs}
            plain = {layers: asdict(cost) for layers, cost in costs.items()}
            arms = {name: arm.meaning for name, arm in ARMS.items() if name in {*self.arms, *saved.get("arms", {})}}
            more = {"costs": plain, "arms": arms, "runs": saved.get("runs", {}) | planned}
            write_json(path, same | more)
        return runs

    def pilot(self) -> dict[int, Cost]:
        """Measure what a step costs at each depth, in a run of a few steps that also prepares the data."""
        path = self.folder / "pilot"
        stages = json.dumps([asdict(stage) for stage in pilot_stages(self.config, PILOT_STEPS)])
        options = [f"--stages={stages}", "--operator=last", "--optimizer_state=stack", "--tracking=none"]
        options += ["--eval_every=0", "--checkpoint_every=0", f"--log_every={PILOT_STEPS // 12}"]
        self.say(f"pilot: {PILOT_STEPS} steps at each depth")
        code = self._start(path, options)
        if not is_finished(replace(self.config, output_dir=str(path))):
            last = _last_line(path.with_suffix(".log"))
            if code == UserError.exit_code:
                raise UserError(last.removeprefix("error: "))
            raise RuntimeError(f"the pilot ended with code {code}: {last}; see {path.with_suffix('.log')}")
        return read_costs(path, CLOCKS[self.clock])

    def train(self, run: ArmRun) -> bool:
        """Run or go on with one run; whether it is finished. A failure is noted beside its directory."""
        path = self.folder / run.path
        finished = replace(self.config, output_dir=str(path))
        failed = path.with_suffix(".failed")
        if is_finished(finished):
            return True
        stages = ", ".join(f"{stage.layers} layers x {stage.steps}" for stage in run.stages)
        self.say(f"{run.path}: {stages}")
        code = self._start(path, run.options())
        if is_finished(finished):
            failed.unlink(missing_ok=True)
            return True
        if code == RunAgain.exit_code:
            raise RunAgain(f"stopped in {run.path}; the same command goes on")
        write_text(failed, f"ended with code {code}: {_last_line(path.with_suffix('.log'))}\n")
        self.say(f"{run.path} failed: {failed.read_text().strip()}")
        return False

    def _start(self, path: Path, options: Sequence[str]) -> int:
        """Start pretrain.py for the run directory `path` and wait for its end; returns its exit code."""
        if self.reason:
            raise RunAgain(f"stopped by {self.reason}; the same command goes on")
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.launch, *self.options, *options, f"--output_dir={path}", "--resume=auto"]
        with path.with_suffix(".log").open("ab") as log:
            # A session of its own: Ctrl-C shall reach this process alone, which then asks by a file.
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            while process.poll() is None:
                if self.reason and (path / CONFIG).exists():
                    (path / STOP).touch()
                time.sleep(0.2)
        if self.reason:
            (path / STOP).unlink(missing_ok=True)
            raise RunAgain(f"stopped by {self.reason} in {path}; the same command goes on")
        return process.returncode

    def _stop(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name


def read_costs(run_dir: Path, clock: str) -> dict[int, Cost]:
    """Cost of a step by depth: FLOPs from the ledger's totals, seconds as the median over a pilot's log lines."""
    costs = {}
    records = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    for layers in sorted({record["layers"] for record in records}):
        own = [record for record in records if record["kind"] == "train" and record["layers"] == layers]
        own = own[len(own) // 3 :]
        steps = own[-1]["step"] - own[0]["step"]
        seconds = [(b[clock] - a[clock]) / (b["step"] - a["step"]) for a, b in pairwise(own)]
        costs[layers] = Cost(
            flops=(own[-1]["flops"] - own[0]["flops"]) / steps, seconds=max(statistics.median(seconds), 1e-9)
        )
    return costs


def _last_line(log: Path) -> str:
    """The last thing that a run said; a line that begins with `error: ` before any other."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "it said nothing"
    )
