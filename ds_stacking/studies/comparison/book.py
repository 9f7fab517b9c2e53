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
    PLAN,
    ArmRun,
    Cost,
    Saved,
    check_same_recipe,
    commit,
    machine,
    plan_runs,
    read_plan,
    saved_arm,
    steps_at,
    unit_of,
    versions,
)
from ds_stacking.studies.comparison.shapes import VERSION
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
class Book:
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

    def open(self, pilot: Callable[[], Pilot]) -> Saved:
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
                saved = read_plan(self.folder)
                saved = self._first(pilot()) if saved is None else self._extended(saved)
            except UserError:
                if not os.path.lexists(self.folder / PLAN):
                    _remove([self.folder / name for name in (*made, *([LOCK] if is_new else []))])
                    with suppress(OSError):  # something else stands there
                        if is_new:
                            self.folder.rmdir()
                raise
            return self._write(saved)

    def update(self, change: Callable[[Saved], None]) -> Saved:
        """Change the plan as it stands now, whoever has changed it since."""
        with self.held(self.folder / LOCK):
            saved = read_plan(self.folder)
            if saved is None:
                raise UserError(f"{self.folder / PLAN} is gone; restore it, or choose another --output_dir.")
            change(saved)
            return self._write(saved)

    def runs(self, saved: Saved) -> list[ArmRun]:
        """The runs that count, of what is asked for now."""
        return plan_runs(self.config, self.arms, saved["budgets"], self.seeds, self.costs(saved), saved["unit"])

    def tuning_runs(self, saved: Saved, arm: Arm, lr: float) -> list[ArmRun]:
        """The runs of the tuning of an arm at one rate."""
        seeds = saved["tuning"]["seeds"] if saved["tuning"] else []
        return _tuning_runs(self.config, arm, seeds, lr, self.costs(saved), saved["unit"])

    def costs(self, saved: Saved) -> dict[int, Cost]:
        """Of a step, by depth. Raises UserError where the pilot did not measure a depth of the arms."""
        costs = {int(layers): Cost(**cost) for layers, cost in saved["costs"].items()}
        unknown = {depth for arm in self.arms.values() for depth in arm.depths} - set(costs)
        if unknown:
            raise UserError(
                f"{self.folder / PLAN} has no cost of {min(unknown)} layers, since its pilot had no such arm; choose "
                f"another --output_dir."
            )
        return costs

    def lr(self, saved: Saved, arm: Arm) -> float:
        """The peak learning rate of an arm: its own, the one that its tuning has chosen, or the recipe's."""
        tuned = saved["tuning"]["arms"].get(arm.name) if saved["tuning"] else None
        return float(arm.settings.get("lr", (tuned and tuned["chosen"]) or self.config.lr))

    def _first(self, found: Pilot) -> Saved:
        """The plan of a comparison that begins."""
        unit = 1.0
        if self.minutes is not None:
            runs = plan_runs(self.config, self.arms, self.budgets, self.seeds, found.costs)
            for arm in self._tuned():
                for lr in tuning.first_rates(self.config.lr):
                    runs += _tuning_runs(self.config, arm, self._tuning_seeds(), lr, found.costs, 1.0)
            unit = unit_of(self.config, self.minutes, runs, found.costs, found.overhead, self.at_once)
        saved = {
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
        return self._filled(cast(Saved, saved))

    def _recipe(self) -> dict[str, Any]:
        return self.config.to_dict() | {"output_dir": None, "name": None, "tracking": None}

    def _extended(self, saved: Saved) -> Saved:
        """A plan that stands, with what is asked for beside it. Raises UserError where it is another comparison's."""
        check_same_recipe(self.folder, saved, {**self._recipe(), "clock": self.clock})
        if self.minutes is not None and self.minutes != saved["minutes"]:
            raise UserError(
                f"{self.folder} was planned for {saved['minutes'] or 'the recipe as it is, not for'} minutes; leave "
                f"--minutes out, or choose another --output_dir."
            )
        seeds = saved["tuning"]["seeds"] if saved["tuning"] else []
        if seeds != self._tuning_seeds():
            raise UserError(
                f"{self.folder} was tuned on {len(seeds)} seeds, and not on {self.tune}; give --tune {len(seeds)}, or "
                f"choose another --output_dir."
            )
        for name, arm in self.arms.items():
            meaning = saved["arms"][name]["meaning"] if name in saved["arms"] else arm.meaning
            if meaning != arm.meaning:
                raise UserError(
                    f"{self.folder} has another arm {name} ({shown(meaning)}); give this one another name."
                )
        self._note_changes(saved)
        saved["budgets"] = sorted({*saved["budgets"], *self.budgets})
        return self._filled(saved)

    def _note_changes(self, saved: Saved) -> None:
        """Note what is another than when the comparison began: what came later, and what it is gone on with."""
        seeds = [seed for seed in self.seeds if seed not in {*saved["seeds"], *saved["added_seeds"]}]
        # what comes once results could have been seen is shown as such
        if self._has_results(saved):
            saved["added_seeds"].extend(seeds)
            arms = [name for name in self.arms if name not in saved["arms"]]
            saved["added_arms"] = [*saved.get("added_arms", []), *arms]
            budgets = {*self.budgets} - {*saved["budgets"]}
            saved["added_budgets"] = [*saved.get("added_budgets", []), *sorted(budgets)]
        else:
            saved["seeds"].extend(seeds)
        now = commit()
        if now is not None and now not in {saved["commit"], *saved["later_commits"]}:
            saved["later_commits"].append(now)
        packages, known = versions(), [saved.get("versions", {}), *saved.get("later_versions", [])]
        if packages not in known:
            saved["later_versions"] = [*known[1:], packages]
        at_once = [saved.get("parallel", 1), *saved.get("later_parallel", [])]
        if self.at_once not in at_once:
            saved["later_parallel"] = [*at_once[1:], self.at_once]

    def _has_results(self, saved: Saved) -> bool:
        counted = [path for path in saved["runs"] if int(path.rpartition("-")[2]) not in self._tuning_seeds()]
        return any((self.folder / path / SUMMARY).exists() for path in counted)

    def _filled(self, saved: Saved) -> Saved:
        """The plan with the arms and runs of what is asked for."""
        for name, arm in self.arms.items():
            made = cast(dict[str, Any], saved["arms"].setdefault(name, cast(Any, saved_arm(self.config, arm))))
            made["baseline"] = made.get("baseline") or arm.baseline  # scratch may come later than its arms
        for arm in self._tuned():
            assert saved["tuning"] is not None
            rates = tuning.first_rates(self.config.lr)
            saved["tuning"]["arms"].setdefault(arm.name, cast(Any, {"rates": rates, "chosen": None}))
            for lr in saved["tuning"]["arms"][arm.name]["rates"]:
                self._note(saved, self.tuning_runs(saved, arm, lr))
        self._note(saved, self.runs(saved))
        return saved

    def _note(self, saved: Saved, runs: Sequence[ArmRun]) -> None:
        for run in runs:
            stages = run.stages(self.config, self.lr(saved, run.arm))
            saved["runs"][run.path] = [[stage.layers, stage.steps] for stage in stages]

    def add_rate(self, arm: Arm, lr: float) -> Saved:
        """Plan one more rate of the tuning of an arm."""

        def change(saved: Saved) -> None:
            assert saved["tuning"] is not None
            rates = saved["tuning"]["arms"][arm.name]["rates"]
            rates.extend({lr} - set(rates))
            rates.sort()
            self._note(saved, self.tuning_runs(saved, arm, lr))

        return self.update(change)

    def choose(self, arm: Arm, lr: float) -> Saved:
        """Note the rate that an arm's tuning has chosen."""

        def change(saved: Saved) -> None:
            assert saved["tuning"] is not None
            saved["tuning"]["arms"][arm.name]["chosen"] = lr
            cast(dict[str, Any], saved["arms"][arm.name])["lr"] = lr

        return self.update(change)

    def is_tuned(self, arm: Arm) -> bool:
        """Whether the arm's rate is one to be tuned."""
        return bool(self.tune) and "lr" not in arm.settings

    def _tuned(self) -> list[Arm]:
        return [arm for arm in self.arms.values() if self.is_tuned(arm)]

    def _tuning_seeds(self) -> list[int]:
        return tuning.tuning_seeds(self.config.seed, self.tune)

    def _write(self, saved: Saved) -> Saved:
        write_json(self.folder / PLAN, saved, inside=self.folder)
        return saved


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
