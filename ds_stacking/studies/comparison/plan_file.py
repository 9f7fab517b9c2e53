"""comparison.json of one comparison: made once, extended by later calls, shared by all tasks of a job array."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.common.own_files import refuse_links
from ds_stacking.common.words import shown
from ds_stacking.config import RunConfig
from ds_stacking.studies.comparison import tuning
from ds_stacking.studies.comparison.arms import Arm
from ds_stacking.studies.comparison.pilot import PILOT
from ds_stacking.studies.comparison.plan import (
    ArmRun,
    Cost,
    check_same_recipe,
    commit,
    machine,
    plan_arm,
    plan_runs,
    steps_at,
    unit_of,
    versions,
)
from ds_stacking.studies.comparison.shapes import PLAN, VERSION, Plan, read_plan
from ds_stacking.training.run_directory import SUMMARY

LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What a pilot has found out."""

    costs: Mapping[int, Cost]
    """Of a step, by depth."""
    fingerprint: str
    """Of the data, which all runs share."""
    overhead: float
    """Seconds of a run beside its training: start, last evaluation, export."""


@dataclass(kw_only=True)
class PlanFile:
    """What is planned in a comparison's folder, and what was found out meanwhile."""

    folder: Path
    """The comparison's directory."""
    config: RunConfig
    """The recipe that all arms share."""
    arms: Mapping[str, Arm]
    """The arms that are asked for now; the file may know more."""
    seeds: Sequence[int]
    """The seeds that are asked for now."""
    budgets: Sequence[float]
    """Budgets of the arms from scratch."""
    tune: int
    """Seeds of the tuning, 0 for none."""
    minutes: float | None
    """What all runs shall take together."""
    clock: str
    """What equal time means."""
    at_once: int
    """Runs at a time."""
    held: Callable[[Path], AbstractContextManager[object]] = FileLock
    """Holds a file lock, waiting for it."""

    def open(self, pilot: Callable[[], Pilot]) -> Plan:
        """The plan with all that is asked for, made once for all that share the directory.

        Raises UserError for another comparison's folder, and whatever `pilot` raises; what was made for a recipe that
        was refused is gone then.
        """
        is_new = not self.folder.exists()
        made = [name for name in (PILOT, f"{PILOT}.log") if not os.path.lexists(self.folder / name)]
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_links(self.folder, (LOCK,))
        with self.held(self.folder / LOCK):
            try:
                plan = read_plan(self.folder)
                plan = self._first(pilot()) if plan is None else self._extended(plan)
            except UserError:
                if not os.path.lexists(self.folder / PLAN):
                    _remove([self.folder / name for name in (*made, *([LOCK] if is_new else []))])
                    with suppress(OSError):  # something else stands there
                        if is_new:
                            self.folder.rmdir()
                raise
            return self._write(plan)

    def update(self, change: Callable[[Plan], None]) -> Plan:
        """Change the plan as it stands now, whoever has changed it since."""
        with self.held(self.folder / LOCK):
            plan = read_plan(self.folder)
            if plan is None:
                raise UserError(f"{self.folder / PLAN} is gone; restore it, or choose another --output_dir.")
            change(plan)
            return self._write(plan)

    def runs(self, plan: Plan) -> list[ArmRun]:
        """The runs that count, of what is asked for now."""
        return plan_runs(self.config, self.arms, plan["budgets"], self.seeds, self.costs(plan), plan["unit"])

    def tuning_runs(self, plan: Plan, arm: Arm, lr: float) -> list[ArmRun]:
        """The runs of the tuning of an arm at one rate."""
        seeds = plan["tuning"]["seeds"] if plan["tuning"] else []
        return _tuning_runs(self.config, arm, seeds, lr, self.costs(plan), plan["unit"])

    def costs(self, plan: Plan) -> dict[int, Cost]:
        """Of a step, by depth. Raises UserError where the pilot did not measure a depth of the arms."""
        costs = {int(layers): Cost(**cost) for layers, cost in plan["costs"].items()}
        unknown = {depth for arm in self.arms.values() for depth in arm.depths} - set(costs)
        if unknown:
            raise UserError(
                f"{self.folder / PLAN} has no cost of {min(unknown)} layers, since its pilot had no such arm; choose "
                f"another --output_dir."
            )
        return costs

    def lr(self, plan: Plan, arm: Arm) -> float:
        """The peak learning rate of an arm: its own, the one that its tuning has chosen, or the recipe's."""
        tuned = plan["tuning"]["arms"].get(arm.name) if plan["tuning"] else None
        return float(arm.settings.get("lr", (tuned and tuned["chosen"]) or self.config.lr))

    def _first(self, found: Pilot) -> Plan:
        """The plan of a comparison that begins."""
        unit = 1.0
        if self.minutes is not None:
            runs = plan_runs(self.config, self.arms, self.budgets, self.seeds, found.costs)
            for arm in self._tuned():
                for lr in tuning.first_rates(self.config.lr):
                    runs += _tuning_runs(self.config, arm, self._tuning_seeds(), lr, found.costs, 1.0)
            unit = unit_of(self.config, self.minutes, runs, found.costs, found.overhead, self.at_once)
        plan = {
            "version": VERSION,
            "commit": commit(),
            "later_commits": [],
            "versions": versions(),
            "machine": machine(),
            "recipe": self._recipe(),
            "clock": self.clock,
            "parallel": self.at_once,
            "minutes": self.minutes,
            "unit": unit,
            "data_fingerprint": found.fingerprint,
            "overhead": found.overhead,
            "costs": {str(layers): asdict(cost) for layers, cost in found.costs.items()},
            "budgets": sorted(set(self.budgets)),
            "seeds": list(self.seeds),
            "added_seeds": [],
            "arms": {},
            "tuning": {"seeds": self._tuning_seeds(), "factor": tuning.FACTOR, "arms": {}} if self.tune else None,
            "runs": {},
        }
        return self._filled(cast(Plan, plan))

    def _recipe(self) -> dict[str, Any]:
        return self.config.to_dict() | {"output_dir": None, "name": None, "tracking": None}

    def _extended(self, plan: Plan) -> Plan:
        """A plan that stands, with what is asked for beside it. Raises UserError where it is another comparison's."""
        check_same_recipe(self.folder, plan, self._recipe(), self.clock)
        if self.minutes is not None and self.minutes != plan["minutes"]:
            raise UserError(
                f"{self.folder} was planned for {plan['minutes'] or 'the recipe as it is, not for'} minutes; leave "
                f"--minutes out, or choose another --output_dir."
            )
        seeds = plan["tuning"]["seeds"] if plan["tuning"] else []
        if seeds != self._tuning_seeds():
            raise UserError(
                f"{self.folder} was tuned on {len(seeds)} seeds, and not on {self.tune}; give --tune {len(seeds)}, or "
                f"choose another --output_dir."
            )
        for name, arm in self.arms.items():
            meaning = plan["arms"][name]["meaning"] if name in plan["arms"] else arm.meaning
            if meaning != arm.meaning:
                raise UserError(
                    f"{self.folder} has another arm {name} ({shown(meaning)}); give this one another name."
                )
        self._note_changes(plan)
        plan["budgets"] = sorted({*plan["budgets"], *self.budgets})
        return self._filled(plan)

    def _note_changes(self, plan: Plan) -> None:
        """Note what is another than when the comparison began: what came later, and what it is gone on with."""
        seeds = [seed for seed in self.seeds if seed not in {*plan["seeds"], *plan["added_seeds"]}]
        # what comes once results could have been seen is shown as such
        if self._has_results(plan):
            plan["added_seeds"].extend(seeds)
            arms = [name for name in self.arms if name not in plan["arms"]]
            plan["added_arms"] = [*plan.get("added_arms", []), *arms]
            budgets = {*self.budgets} - {*plan["budgets"]}
            plan["added_budgets"] = [*plan.get("added_budgets", []), *sorted(budgets)]
        else:
            plan["seeds"].extend(seeds)
        now = commit()
        if now is not None and now not in {plan["commit"], *plan["later_commits"]}:
            plan["later_commits"].append(now)
        packages, known = versions(), [plan.get("versions", {}), *plan.get("later_versions", [])]
        if packages not in known:
            plan["later_versions"] = [*known[1:], packages]
        at_once = [plan.get("parallel", 1), *plan.get("later_parallel", [])]
        if self.at_once not in at_once:
            plan["later_parallel"] = [*at_once[1:], self.at_once]

    def _has_results(self, plan: Plan) -> bool:
        counted = [path for path in plan["runs"] if int(path.rpartition("-")[2]) not in self._tuning_seeds()]
        return any((self.folder / path / SUMMARY).exists() for path in counted)

    def _filled(self, plan: Plan) -> Plan:
        """The plan with the arms and runs of what is asked for."""
        for name, arm in self.arms.items():
            made = plan["arms"].setdefault(name, plan_arm(self.config, arm))
            made["baseline"] = made["baseline"] or arm.baseline  # scratch may come later than its arms
        for arm in self._tuned():
            assert plan["tuning"] is not None
            rates = tuning.first_rates(self.config.lr)
            plan["tuning"]["arms"].setdefault(arm.name, {"rates": rates, "chosen": None})
            for lr in plan["tuning"]["arms"][arm.name]["rates"]:
                self._note(plan, self.tuning_runs(plan, arm, lr))
        self._note(plan, self.runs(plan))
        return plan

    def _note(self, plan: Plan, runs: Sequence[ArmRun]) -> None:
        for run in runs:
            stages = run.stages(self.config, self.lr(plan, run.arm))
            plan["runs"][run.path] = [[stage.layers, stage.steps] for stage in stages]

    def add_rate(self, arm: Arm, lr: float) -> Plan:
        """Plan one more rate of the tuning of an arm."""

        def change(plan: Plan) -> None:
            assert plan["tuning"] is not None
            rates = plan["tuning"]["arms"][arm.name]["rates"]
            rates.extend({lr} - set(rates))
            rates.sort()
            self._note(plan, self.tuning_runs(plan, arm, lr))

        return self.update(change)

    def choose(self, arm: Arm, lr: float) -> Plan:
        """Note the rate that an arm's tuning has chosen."""

        def change(plan: Plan) -> None:
            assert plan["tuning"] is not None
            plan["tuning"]["arms"][arm.name]["chosen"] = lr
            plan["arms"][arm.name]["lr"] = lr

        return self.update(change)

    def is_tuned(self, arm: Arm) -> bool:
        """Whether the arm's rate is one to be tuned."""
        return bool(self.tune) and "lr" not in arm.settings

    def _tuned(self) -> list[Arm]:
        return [arm for arm in self.arms.values() if self.is_tuned(arm)]

    def _tuning_seeds(self) -> list[int]:
        return tuning.tuning_seeds(self.config.seed, self.tune)

    def _write(self, plan: Plan) -> Plan:
        write_json(self.folder / PLAN, plan, inside=self.folder)
        return plan


def _tuning_runs(
    config: RunConfig, arm: Arm, seeds: Sequence[int], lr: float, costs: Mapping[int, Cost], unit: float
) -> list[ArmRun]:
    return [
        ArmRun(arm=arm, label=tuning.label(lr), seed=seed, steps=steps_at(config, arm, seed, costs, unit)[0])
        for seed in seeds
    ]


def _remove(paths: Sequence[Path]) -> None:
    """Delete files and folders, as far as they are there."""
    for path in paths:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
