"""A comparison of arms: every arm a real pre-training run in its own directory, started one after another.

A comparison's directory holds `comparison.json` (recipe, clock, measured costs, the plan), `pilot/`, and for every run
its directory `<arm>/<label>/seed-<n>/` with what it printed in `seed-<n>.log` beside it. Called again, finished runs
stay as they are, stopped ones go on, and arms or seeds may be added. `comparison.json` is written once the pilot has
succeeded, so a recipe that was refused leaves the directory free for the mended one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from filelock import FileLock
from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import RunAgain, RunFailed, UserError
from ds_stacking.common.files import write_json, write_text
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, read_json
from ds_stacking.common.json_lines import read_json_lines
from ds_stacking.common.outputs import check_output_folder, writing
from ds_stacking.common.own_files import make_inside, open_inside, refuse_links
from ds_stacking.common.words import plain, shown
from ds_stacking.config import RunConfig
from ds_stacking.studies.comparison.arms import ARMS, ArmRun, Cost, check_arms, pilot_stages, plan_arms
from ds_stacking.training.run_directory import CONFIG, METRICS, STOP, is_finished, refuse_place

PLAN, PILOT = "comparison.json", "pilot"
PILOT_STEPS = 60
"""Steps of the pilot at each depth, the first third of which is not counted."""
PILOT_OPTIONS = {
    "operator": "last",
    "optimizer_state": "stack",
    "tracking": "none",
    "eval_every": 0,
    "checkpoint_every": 0,
    "log_every": PILOT_STEPS // 12,
}
"""What a pilot is run with, whatever the recipe."""
CLOCKS = {"wall": "training_seconds", "cpu": "cpu_seconds"}
"""The field of a record that holds the seconds of each clock."""


MOST_SEEDS = 1000
LAST_WORDS = 1 << 16
"""Bytes at the end of a log in which a run's last words are looked for."""
Spent = Annotated[float, Field(allow_inf_nan=False, ge=1e-12, le=1e39)]


class SavedCost(TypedDict):
    """What a step costs, in comparison.json."""

    flops: Spent
    seconds: Spent


class Saved(TypedDict):
    """comparison.json: what is read of it to go on."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    recipe: dict[str, Any]
    clock: str
    costs: dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], SavedCost]
    arms: dict[str, str]
    runs: dict[str, list[list[Count]]]


class PilotStage(TypedDict):
    """A stage in the pilot's config.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    steps: Count


class PilotConfig(TypedDict):
    """The pilot's config.json, beside PILOT_OPTIONS."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    stages: list[PilotStage]


class PilotLine(TypedDict):
    """A line of the pilot's metrics.jsonl."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: str
    layers: Count
    step: Count
    flops: Finite
    training_seconds: NotRequired[Finite]
    cpu_seconds: NotRequired[Finite]


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
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise UserError(f"seeds is {self.seeds}; it must be 1 to {MOST_SEEDS:,}.")
        if self.config.seed + self.seeds > 2**32:
            raise UserError(f"seed {self.config.seed} leaves no room for {self.seeds} seeds below 2**32; give less.")
        if not self.launch or shutil.which(self.launch[0]) is None:
            program = shown(self.launch[0]) if self.launch else "empty"
            raise UserError(f"launch names {program}, which is no program that can be started; give one, or its path.")
        self.folder = check_output_folder(self.config.run_dir, "output_dir")
        if os.path.lexists(self.folder / CONFIG) and not os.path.lexists(self.folder / PLAN):
            raise UserError(f"output_dir {self.folder} holds a run, and no comparison; choose another --output_dir.")
        refuse_place(self.folder)
        self._refuse_foreign()

    def _refuse_foreign(self) -> None:
        """Raise UserError where a new comparison would run in folders that are somebody else's."""
        standing = [name for name in self.arms if os.path.lexists(self.folder / name)]
        if os.path.lexists(self.folder / PILOT) and not is_pilot(self.folder):
            standing.append(PILOT)
        # asked last: what runs beside this one writes its plan before its first arm
        if standing and not os.path.lexists(self.folder / PLAN):
            raise UserError(
                f"output_dir {self.folder} holds {standing[0]}/, and no {PLAN} that it would belong to; choose "
                f"another --output_dir, or move it away."
            )

    def run(self, task: int | None = None) -> list[str]:
        """Run everything, or only one arm with one seed (`task`, counted from 0); returns the runs that failed.

        Raises UserError for bad input of all runs, which the pilot meets first, RunFailed where the pilot fails, and
        RunAgain when asked to stop.
        """
        pairs = [(arm, seed) for arm in self.arms for seed in range(self.config.seed, self.config.seed + self.seeds)]
        if task is not None and not 0 <= task < len(pairs):
            raise UserError(
                f"task {task} is not among the {len(pairs)} of {len(self.arms)} arms and {self.seeds} seeds."
            )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._stop)
        wanted = pairs if task is None else [pairs[task]]
        with writing(self.folder):
            runs = [run for run in self.plan() if (run.arm, run.seed) in wanted]
            return [run.path for run in runs if not self.train(run)]

    def plan(self) -> list[ArmRun]:
        """The runs, planned once for all that share the directory; a pilot measures what a step costs."""
        is_new = not self.folder.exists()
        made = [name for name in (PILOT, f"{PILOT}.log") if not os.path.lexists(self.folder / name)]
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_links(self.folder, (".lock",))
        with FileLock(self.folder / ".lock"):
            try:
                return self._plan()
            except UserError:
                if not os.path.lexists(self.folder / PLAN):  # made for what was refused
                    _remove([self.folder / name for name in (*made, *([".lock"] if is_new else []))])
                    with suppress(OSError):  # something else stands there
                        if is_new:
                            self.folder.rmdir()
                raise

    def _plan(self) -> list[ArmRun]:
        recipe = self.config.to_dict() | {"output_dir": None, "name": None, "tracking": None}
        path = self.folder / PLAN
        saved = self._saved(path, recipe)
        costs = {int(layers): Cost(**cost) for layers, cost in saved["costs"].items()} if saved else self.pilot()
        unknown = {stage.layers for stage in pilot_stages(self.config, 1)} - set(costs)
        if unknown:
            raise UserError(
                f"{path} has no cost of {min(unknown)} layers; restore it, or choose another --output_dir."
            )
        runs = plan_arms(self.config, self.arms, self.budgets, self.seeds, costs)
        planned = {run.path: [[stage.layers, stage.steps] for stage in run.stages] for run in runs}
        known: Any = saved or {"arms": {}, "runs": {}}
        arms = {name: arm.meaning for name, arm in ARMS.items() if name in {*self.arms, *known["arms"]}}
        content = {"recipe": recipe, "clock": self.clock, "costs": {n: asdict(cost) for n, cost in costs.items()}}
        write_json(path, content | {"arms": arms, "runs": known["runs"] | planned}, inside=self.folder)
        return runs

    def _saved(self, path: Path, recipe: dict[str, Any]) -> Saved | None:
        """What an earlier call has planned. Raises UserError where that was for another recipe, or is damaged."""
        if not os.path.lexists(path):
            return None
        saved = read_json(path, Saved, mend="restore it, or choose another --output_dir", inside=self.folder)
        wanted = {**recipe, "clock": self.clock}
        for name, value in {**saved["recipe"], "clock": saved["clock"]}.items():
            if name not in wanted or value != wanted[name]:
                raise UserError(
                    f"{self.folder} holds a comparison of another recipe ({plain(name, 60)} {shown(value)}, not "
                    f"{shown(wanted.get(name))}); choose another --output_dir."
                )
        if wanted.keys() - saved["recipe"].keys() - {"clock"}:
            raise UserError(f"{self.folder} holds a comparison of another version; choose another --output_dir.")
        return saved

    def pilot(self) -> dict[int, Cost]:
        """Measure what a step costs at each depth, in a run of a few steps that also prepares the data."""
        self._refuse_foreign()  # again: it was not looked at under the lock
        path = self.folder / PILOT
        stages = json.dumps([asdict(stage) for stage in pilot_stages(self.config, PILOT_STEPS)])
        options = [f"--stages={stages}", *(f"--{name}={value}" for name, value in PILOT_OPTIONS.items())]
        self.say(f"pilot: {PILOT_STEPS} steps at each depth")
        # afresh: what stands there may be a pilot of a recipe that was refused
        code, last = self._start(path, [*options, "--overwrite"])
        if not is_finished(replace(self.config, output_dir=str(path))):
            if code == UserError.exit_code:
                raise UserError(last.removeprefix("error: "))
            raise RunFailed(
                f"the pilot ended with code {code}: {last}; see {path.with_suffix('.log')}, and give the same command "
                f"again, or a mended one."
            )
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
        code, last = self._start(path, [*run.options(), "--resume=auto"])
        if is_finished(finished):
            failed.unlink(missing_ok=True)
            return True
        if code == RunAgain.exit_code:
            raise RunAgain(f"stopped in {run.path}; the same command goes on")
        words = f"ended with code {code}: {last}"
        write_text(failed, f"{words}\n", inside=self.folder)
        self.say(f"{run.path} failed: {words}")
        return False

    def _start(self, path: Path, options: Sequence[str]) -> tuple[int, str]:
        """Start pretrain.py for the run directory `path` and wait for its end; its exit code and last words."""
        if self.reason:
            raise RunAgain(f"stopped by {self.reason}; the same command goes on")
        make_inside(self.folder, *path.parent.relative_to(self.folder).parts)
        command = [*self.launch, *self.options, *options, f"--output_dir={path}"]
        name = str(path.with_suffix(".log").relative_to(self.folder))
        with open(open_inside(self.folder, name, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b", buffering=0) as log:
            begin = log.seek(0, os.SEEK_END)
            # A session of its own: Ctrl-C shall reach this process alone, which then asks by a file.
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            while process.poll() is None:
                if self.reason and (path / CONFIG).exists():
                    os.close(open_inside(path, STOP, os.O_WRONLY | os.O_CREAT))
                time.sleep(0.2)
            log.seek(max(begin, log.seek(0, os.SEEK_END) - LAST_WORDS))
            last = _last_line(log.read().decode(errors="replace"))
        if self.reason:
            (path / STOP).unlink(missing_ok=True)
            raise RunAgain(f"stopped by {self.reason} in {path}; the same command goes on")
        return process.returncode, last

    def _stop(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name


def is_pilot(folder: Path) -> bool:
    """Whether `folder`/pilot holds a comparison's pilot, of whatever recipe, or no run yet."""
    path = folder / PILOT / CONFIG
    try:
        config = read_json(path, PilotConfig, mend="", inside=folder)
    except FileNotFoundError:
        return True  # --overwrite looks at what else may be there
    except (OSError, UserError):
        return False
    fits = all(config.get(name) == value for name, value in PILOT_OPTIONS.items())
    return fits and all(stage["steps"] == PILOT_STEPS for stage in config["stages"])


def _remove(paths: Sequence[Path]) -> None:
    """Delete files and folders, as far as they are there."""
    for path in paths:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_costs(run_dir: Path, clock: str) -> dict[int, Cost]:
    """Cost of a step by depth: FLOPs from the ledger's totals, seconds as the median over a pilot's log lines.

    Raises UserError where the pilot's metrics are damaged or do not tell.
    """
    by_depth: dict[int, list[Any]] = {}
    path, mend = run_dir / METRICS, f"delete {run_dir}, and the pilot is run again"
    for _, record in read_json_lines(path, PilotLine, mend=mend, inside=run_dir):
        if record["kind"] == "train" and clock in record:
            by_depth.setdefault(record["layers"], []).append(record)
    costs = {}
    for layers, own in sorted(by_depth.items()):
        own = own[len(own) // 3 :]
        pairs = [(a, b) for a, b in pairwise(own) if b["step"] > a["step"]]
        seconds = [(b[clock] - a[clock]) / (b["step"] - a["step"]) for a, b in pairs]
        flops, steps = own[-1]["flops"] - own[0]["flops"], own[-1]["step"] - own[0]["step"]
        if not (pairs and flops > 0 and steps > 0):
            raise UserError(f"{path} does not tell what a step of {layers} layers costs; {mend}.")
        costs[layers] = Cost(flops=flops / steps, seconds=max(statistics.median(seconds), 1e-9))
    return costs


def _last_line(text: str) -> str:
    """The last thing that a run said; a line that begins with `error: ` before any other."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return plain(found) or "it said nothing"
