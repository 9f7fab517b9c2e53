"""A comparison of arms: every arm a real pre-training run in its own directory, one or several at a time.

A comparison's directory holds `comparison.json` (plan.py), `pilot/`, and for every run its directory
`<arm>/<label>/seed-<n>/` with what it printed in `seed-<n>.log` beside it. Called again, finished runs stay as they
are, stopped ones go on, and arms or seeds may be added. `comparison.json` is written once the pilot has succeeded, so
a recipe that was refused leaves the directory free for the mended one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from ds_stacking.common.errors import RunAgain, RunFailed, UserError
from ds_stacking.common.failures import LOST
from ds_stacking.common.files import write_text
from ds_stacking.common.outputs import check_output_folder, writing
from ds_stacking.common.own_files import read_inside, refuse_links
from ds_stacking.common.words import shown
from ds_stacking.config import RunConfig
from ds_stacking.reports.run_files import read_summary
from ds_stacking.studies.comparison import pilot, tuning
from ds_stacking.studies.comparison.arms import Arm, check_budgets, resolve_arms
from ds_stacking.studies.comparison.pilot import PILOT, PILOT_STEPS, is_pilot, pilot_options, read_costs
from ds_stacking.studies.comparison.plan import ArmRun
from ds_stacking.studies.comparison.plan_file import Pilot, PlanFile
from ds_stacking.studies.comparison.progress import Progress
from ds_stacking.studies.comparison.shapes import PLAN, SECONDS, Plan
from ds_stacking.studies.comparison.starting import Slot, Starter
from ds_stacking.studies.comparison.words import plural
from ds_stacking.training.run_directory import CONFIG, is_finished, refuse_place

MOST_SEEDS = 1000
DIVERGED = ("are not finite", "is too high")
"""In the last words of a run whose learning rate was too high; any other failure is no word on the rate."""
START = 15.0
"""Seconds until a run stands on prepared data, as they are taken to be; the pilot prepares them, and cannot tell."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Comparison:
    """What is compared, and how its runs are started."""

    config: RunConfig
    """The recipe that all arms share; its seed is the first."""
    options: list[str]
    """Options of pretrain.py that make it."""
    arms: Sequence[str]
    """Names of arms.NAMES; the shallow arms come by themselves."""
    own: Sequence[str] = ()
    """Arms of the user's own, NAME=LAYERS:STEPS,..."""
    seeds: int = 5
    """Runs of every arm."""
    budgets: Sequence[float] = (0.5, 0.7, 1.0, 1.4)
    """Budgets of scratch, in units of the recipe's own FLOPs."""
    tune: int = 0
    """Seeds on which each arm's learning rate is tuned first; 0: all have the recipe's."""
    minutes: float | None = None
    """What all runs shall take together; the recipe's steps are multiplied by what that means. None: as they are."""
    clock: Literal["wall", "cpu"] = "wall"
    """What equal time means; cpu: processor time, for one pinned thread on a machine that others use too."""
    launch: Sequence[str]
    """The command that starts pretrain.py, up to its options."""
    slots: Sequence[Slot] = (Slot(),)
    """Where runs run, one at each at a time."""
    log: Callable[[str], None] = print
    """Shows a line."""
    progress: Progress = field(init=False)
    lost: set[str] = field(default_factory=set, init=False)
    """Runs that failed for what may not come again, such as a lost node."""
    fingerprint: str = field(init=False)
    """Of the data, which all runs share; known once there is a plan."""

    def __post_init__(self) -> None:
        self.resolved = resolve_arms(self.config, self.arms, self.own)
        check_budgets(self.budgets)
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise UserError(f"seeds is {self.seeds}; it must be 1 to {MOST_SEEDS:,}.")
        if self.config.seed + tuning.FIRST_SEED + MOST_SEEDS > 2**32:
            raise UserError(
                f"seed {self.config.seed} leaves no room below 2**32 for {self.seeds} seeds and those of a tuning; "
                f"give less."
            )
        if not self.launch or shutil.which(self.launch[0]) is None:
            program = shown(self.launch[0]) if self.launch else "empty"
            raise UserError(f"launch names {program}, which is no program that can be started; give one, or its path.")
        self.folder = check_output_folder(self.config.run_dir, "output_dir")
        if os.path.lexists(self.folder / CONFIG) and not os.path.lexists(self.folder / PLAN):
            raise UserError(f"output_dir {self.folder} holds a run, and no comparison; choose another --output_dir.")
        refuse_place(self.folder)
        self._refuse_foreign()
        self.starter = Starter(folder=self.folder, launch=self.launch, slots=self.slots)
        self.plan_file = PlanFile(
            folder=self.folder,
            config=self.config,
            arms=self.resolved,
            seeds=range(self.config.seed, self.config.seed + self.seeds),
            budgets=self.budgets,
            tune=self.tune,
            minutes=self.minutes,
            clock=self.clock,
            at_once=len(self.slots),
            held=self.starter.held,
        )

    def _refuse_foreign(self) -> None:
        """Raise UserError where a new comparison would run in folders that are somebody else's."""
        standing = [name for name in self.resolved if os.path.lexists(self.folder / name)]
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
        pairs = [(arm, seed) for arm in self.resolved for seed in self.plan_file.seeds]
        if task is not None and not 0 <= task < len(pairs):
            raise UserError(
                f"task {task} is not among the {len(pairs)} of {len(self.resolved)} arms ({', '.join(self.resolved)}) "
                f"and {self.seeds} seeds."
            )
        wanted = pairs if task is None else [pairs[task]]
        with self.starter.stopped_by_signals(), writing(self.folder):
            plan = self.plan()
            self.fingerprint = plan["data_fingerprint"]
            runs = [run for run in self.plan_file.runs(plan) if (run.arm.name, run.seed) in wanted]
            named = {name for name, _ in wanted}
            tuned = [arm for arm in self.resolved.values() if arm.name in named and self.plan_file.is_tuned(arm)]
            self._announce(plan, tuned, runs)
            failed = [path for paths in self._each(self._tune, tuned) for path in paths]
            without_rate = {path.partition("/")[0] for path in failed}
            runs = [run for run in runs if run.arm.name not in without_rate]
            lrs = [self.plan_file.lr(plan, run.arm) for plan in [self.plan()] for run in runs]
            done = self._each(lambda pair: self._train(*pair), list(zip(runs, lrs, strict=True)))
            return failed + [run.path for run, is_done in zip(runs, done, strict=True) if not is_done]

    def plan(self) -> Plan:
        """The plan, made once for all that share the directory; a pilot measures what a step costs."""
        return self.plan_file.open(self._pilot)

    def _each(self, do: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What `do` gives for each item, as many at a time as there are slots."""
        with ThreadPoolExecutor(len(self.slots)) as pool:
            return list(pool.map(do, items))

    def _announce(self, plan: Plan, tuned: Sequence[Arm], runs: Sequence[ArmRun]) -> None:
        """Say how many runs there will be, and how long they will take."""
        first = [
            run
            for arm in tuned
            for lr in (plan["tuning"]["arms"][arm.name]["rates"] if plan["tuning"] else [])
            for run in self.plan_file.tuning_runs(plan, arm, lr)
        ]
        costs = self.plan_file.costs(plan)
        left = {run.path: run.seconds(costs) + plan["overhead"] for run in [*first, *runs] if not self._is_done(run)}
        self.progress = Progress(self.log, left, len(first) + len(runs), len(self.slots))
        self.progress.announce(f"{len(self.resolved)} arms ({', '.join(self.resolved)}), {plural(self.seeds, 'seed')}")

    def _pilot(self) -> Pilot:
        """Measure what a step costs at each depth, in a run of a few steps that also prepares the data."""
        self._refuse_foreign()  # again: it was not looked at under the lock
        path = self.folder / PILOT
        self.log(f"pilot: {PILOT_STEPS} steps at each depth")
        code, last = self.starter.start(path, [*self.options, *pilot_options(self.config, self.resolved)])
        if not is_finished(replace(self.config, output_dir=str(path))):
            if code == UserError.exit_code:
                raise UserError(last.removeprefix("error: "))
            raise RunFailed(
                f"the pilot ended with code {code}: {last}; see {path.with_suffix('.log')}, and give the same command "
                f"again, or a mended one."
            )
        summary = pilot.read_summary(path)
        return Pilot(
            costs=read_costs(path, SECONDS[self.clock]),
            fingerprint=summary["data_fingerprint"],
            overhead=START + max(0.0, summary["seconds"] - summary["training_seconds"]),
        )

    def _tune(self, arm: Arm) -> list[str]:
        """Choose the arm's learning rate, unless that was done; returns the runs that failed, without a choice then.

        One process at a time, so that the tasks of a job array which share an arm tune it once.
        """
        lock = f".tune-{arm.name}"
        refuse_links(self.folder, (lock,))
        with self.starter.held(self.folder / lock):
            plan = self.plan()
            assert plan["tuning"] is not None
            known = plan["tuning"]["arms"][arm.name]
            if known["chosen"] is not None:
                return []
            rates = known["rates"]
            losses: dict[float, float] = {}
            while rates:
                for lr in rates:
                    runs = self.plan_file.tuning_runs(plan, arm, lr)
                    failed = [run.path for run in runs if not self._try_rate(run, lr)]
                    if failed:
                        return failed
                    losses[lr] = tuning.mean_loss([self._loss(run) for run in runs])
                found = tuning.next_rate(losses)
                rates = [] if found is None else [found]
                if found is not None:
                    plan = self.plan_file.add_rate(arm, found)
                    self.progress.add(
                        {
                            run.path: run.seconds(self.plan_file.costs(plan))
                            for run in self.plan_file.tuning_runs(plan, arm, found)
                        }
                    )
            best = tuning.chosen(losses)
            if best is None:
                return [run.path for lr in losses for run in self.plan_file.tuning_runs(plan, arm, lr)]
            self.plan_file.choose(arm, best)
            self.log(f"{arm.name}: of {', '.join(f'{lr:g}' for lr in sorted(losses))} learning rate {best:g} is best")
            return []

    def _loss(self, run: ArmRun) -> float | None:
        """Loss at the end of a run; None where it diverged."""
        summary = read_summary(self.folder / run.path)
        return None if summary is None else summary.get("eval_loss_masked")

    def _try_rate(self, run: ArmRun, lr: float) -> bool:
        """Run one run of the tuning; whether it tells about the rate: it ended, or it diverged, now or before."""
        return self._has_diverged(run) or self._train(run, lr) or self._has_diverged(run)

    def _has_diverged(self, run: ArmRun) -> bool:
        with suppress(OSError):
            words = read_inside(self.folder, f"{run.path}.failed", limit=1 << 16).decode(errors="replace")
            return any(said in words for said in DIVERGED)
        return False

    def _is_done(self, run: ArmRun) -> bool:
        return is_finished(replace(self.config, output_dir=str(self.folder / run.path)))

    def _train(self, run: ArmRun, lr: float) -> bool:
        """Run or go on with one run; whether it is finished. A failure is noted beside its directory."""
        path = self.folder / run.path
        failed = path.with_suffix(".failed")
        if self._is_done(run):
            return True
        stages = run.stages(self.config, lr)
        self.progress.begin(run.path, ", ".join(f"{stage.layers} layers x {stage.steps}" for stage in stages))
        pinned = f"--corpus.fingerprint={self.fingerprint}"
        options = [*self.options, *run.options(self.config, lr), pinned, "--resume=auto"]
        code, last = self.starter.start(path, options, lambda record: self.progress.watch(run.path, record))
        if self._is_done(run):
            failed.unlink(missing_ok=True)
            loss = self._loss(run)
            self.progress.end(run.path, f"ended at loss {loss:.3f}" if loss is not None else "ended")
            return True
        if code == RunAgain.exit_code:
            raise RunAgain(f"stopped in {run.path}; the same command goes on")
        if code == LOST or not 0 <= code < 128:  # it was killed, or a device or the network is gone
            self.lost.add(run.path)
        words = f"ended with code {code}: {last}"
        write_text(failed, f"{words}\n", inside=self.folder)
        self.progress.end(run.path, f"failed: {words}")
        return False
