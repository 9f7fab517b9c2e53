"""What fine-tunings on GLUE have left in the output folder, which trainings follow from it, and what was chosen.

Nothing here reads a model or data: a setting is chosen by results on a part of the training set, which stand in files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NotRequired

from filelock import FileLock
from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json
from ds_stacking.common.json_files import KEEP_OTHERS, Count, read_json
from ds_stacking.common.own_files import make_inside, refuse_links
from ds_stacking.common.words import shown
from ds_stacking.studies.glue.choice import HELD_OUT, Choice, Percent, best_setting, mean_over_seeds, mean_score
from ds_stacking.studies.glue.configuration import BASELINES, GlueConfig, Job, Setting
from ds_stacking.studies.glue.task_data import NEVER_LABELLED
from ds_stacking.studies.glue.tasks import TASKS, Task, select_tasks

CHOICES = "choices.json"
MEND = "delete it, and the same command does that training again"
COMPARABLE = ("model", "tokenizer", "data", "max_length", "precision", "dropout", "choose_on", "test_labels")
"""Fields of the configuration that all results of one folder share."""
PROTOCOL = "settings chosen on a part of the training set"
"""What else they share; folders of versions that chose on the development set lack it."""


class Result(TypedDict):
    """results/<job>.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    arm: str
    task: str
    choosing: bool
    epochs: Count
    batch_size: Count
    lr: Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e39)]
    seed: Count
    failed: NotRequired[str]
    scores: NotRequired[dict[str, dict[str, Percent]]]
    test_scores: NotRequired[dict[str, dict[str, Percent]]]
    examples: NotRequired[dict[str, Count]]
    choice: NotRequired[Choice]


class Choices(TypedDict):
    """choices.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    choices: list[Choice]


def read_result(folder: Path, name: str) -> Result | None:
    """What the training `name` left; None where it has not been done. Raises UserError where the file is damaged."""
    path = folder / "results" / f"{name}.json"
    try:
        return read_json(path, Result, mend=MEND, inside=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {MEND}.") from None


def read_choices(folder: Path) -> dict[tuple[str, str], Choice]:
    """Task and arm -> how its setting was chosen. Raises UserError where the file is damaged."""
    try:
        found = read_json(folder / CHOICES, Choices, mend="give the same command again", inside=folder)
    except FileNotFoundError:
        return {}
    return {(choice["task"], choice["arm"]): choice for choice in found["choices"]}


class GlueResults:
    """The output folder of a configuration."""

    def __init__(self, config: GlueConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.started = time.time()

    def check_results(self) -> None:
        """Read what is there. Raises UserError for what is damaged, or what these results could not stand beside."""
        path = self.folder / "config.json"
        try:
            other = read_json(path, dict[str, Any], mend="choose another --output_dir", inside=self.folder)
        except FileNotFoundError:
            if (self.folder / "results").is_dir() and any((self.folder / "results").glob("*.json")):
                raise UserError(f"{self.folder} has results and no config.json; restore it.") from None
            for name in ("metrics.jsonl", "comparison.json", "attention.json", "manifest.json"):
                if (self.folder / name).is_file():
                    raise UserError(
                        f"{self.folder} holds {name} of another command; choose another --output_dir."
                    ) from None
            return
        if not other.keys() >= {"model", "max_length"} or "stages" in other or "hidden_size" in other:
            raise UserError(f"{path} is that of another command; choose another --output_dir.")
        if "protocol" not in other:
            raise UserError(
                f"{self.folder} holds results of a version that chose settings on the development set, which do not "
                f"stand beside these; choose another --output_dir."
            )
        for name, value in self.comparable().items():
            if other.get(name) != value:
                raise UserError(
                    f"{self.folder} holds results with {name} {shown(other.get(name))}, not {shown(value)}; "
                    f"choose another --output_dir."
                )
        for job in self.possible():
            self.result(job)

    def comparable(self) -> dict[str, Any]:
        """What all results of the folder share."""
        shared = {name: value for name, value in asdict(self.config).items() if name in COMPARABLE}
        return shared | {"protocol": PROTOCOL}

    def possible(self) -> list[Job]:
        """Every training that the configuration may come to, whichever settings are chosen."""
        return [
            job
            for task, arm in self.arms()
            for trials in [self.config.trials(task, arm)]
            for finals in [self.config.finals(task, arm, one) for one in self.config.settings(task)]
            for job in [*trials, *finals]
        ]

    def arms(self) -> list[tuple[Task, str]]:
        """What is measured, task by task."""
        return [(task, arm) for task in select_tasks(self.config.tasks) for arm in self.config.arms]

    def jobs(self) -> list[Job]:
        """The trainings that are known by now: those that settings are chosen by, and the final ones of the chosen."""
        known = []
        for task, arm in self.arms():
            known += self.config.trials(task, arm)
            setting = self.chosen(task, arm)
            known += self.config.finals(task, arm, setting) if setting else []
        return known

    def chosen(self, task: Task, arm: str) -> Setting | None:
        """The setting that an arm is measured at; None as long as one is being tried, and where all of them failed."""
        trials = self.config.trials(task, arm)
        if not trials:
            return self.config.settings(task)[0]
        return best_setting(self.tried(task, arm)) if all(self.settled(job) for job in trials) else None

    def tried(self, task: Task, arm: str) -> dict[Setting, float | None]:
        """Mean score of every setting on the part of the training set that was held out; None where one failed."""
        scores: dict[Setting, list[float | None]] = {}
        for job in self.config.trials(task, arm):
            result = self.result(job)
            score = mean_score(result["scores"]) if result and "scores" in result else None
            scores.setdefault(job.setting, []).append(score)
        return {setting: mean_over_seeds(values) for setting, values in scores.items()}

    def make_folder(self) -> None:
        """Make the output folder. Raises UserError where it holds results that these could not stand beside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        make_inside(self.folder, "results")
        refuse_links(self.folder / "results", (".config.lock", *(f".{job.name}.lock" for job in self.possible())))
        with FileLock(self.folder / "results" / ".config.lock"):
            self.check_results()
            write_json(self.folder / "config.json", self.comparable(), inside=self.folder)

    def settled(self, job: Job) -> bool:
        """Whether the job is done, or failed since this process began."""
        result = self.result(job)
        return result is not None and ("failed" not in result or self.path(job).stat().st_mtime >= self.started)

    def result(self, job: Job) -> Result | None:
        """What the job left; None where it has not been done. Raises UserError for what is no result of this job."""
        result = read_result(self.folder, job.name)
        if result is None:
            return None
        found = [result.get("scores", {}), result.get("test_scores", {})]
        figures = [{name: set(scores) for name, scores in sets.items()} for sets in found]
        whole = "failed" in result or figures == self.expected(job)
        if not whole or any(result.get(name) != value for name, value in asdict(job).items()):
            raise UserError(f"{self.path(job)} is not the result of that training; {MEND}.")
        return result

    def expected(self, job: Job) -> list[dict[str, set[str]]]:
        """Sets that a job is scored on, with their metrics: those of a choice or of development, and those of test."""
        task = TASKS[job.task]
        tests = [name for name in task.test if name != NEVER_LABELLED and self.config.test_labels and not job.choosing]
        names = [[HELD_OUT] if job.choosing else task.dev, tests]
        return [{name: set(task.metrics) for name in sets} for sets in names]

    def path(self, job: Job) -> Path:
        """The file of a job's result."""
        return self.folder / "results" / f"{job.name}.json"

    def examples(self, trials: Sequence[Job]) -> int:
        """Examples that a choice was made on; 0 where there was none."""
        results = [self.result(job) for job in trials]
        return max((result["examples"][HELD_OUT] for result in results if result and "examples" in result), default=0)

    def finish(self) -> list[str]:
        """Write choices.json, which the report reads; returns the names of all trainings that the report is about."""
        choices: list[Choice] = []
        for task, arm in self.arms():
            if arm in BASELINES:
                results = [self.result(job) for job in self.config.finals(task, arm, (0, 0, 0.0))]
                choices += [result["choice"] for result in results if result and "choice" in result]
            elif setting := self.chosen(task, arm):
                choices.append(
                    Choice(
                        task=task.name,
                        arm=arm,
                        setting=_named(setting),
                        examples=self.examples(self.config.trials(task, arm)),
                        seeds=self.config.seeds,
                        scores=[(_named(one), score) for one, score in self.tried(task, arm).items()],
                    )
                )
        write_json(self.folder / CHOICES, {"choices": choices}, inside=self.folder)
        return [job.name for job in self.jobs()]


def _named(setting: Setting) -> dict[str, float]:
    return dict(zip(("epochs", "batch_size", "lr"), setting, strict=True))
