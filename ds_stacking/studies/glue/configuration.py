"""The configuration of fine-tuning on GLUE, and the jobs that it asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from ds_stacking.common.errors import UserError
from ds_stacking.common.outputs import check_output_folder
from ds_stacking.common.words import nearest, shown
from ds_stacking.studies.glue.tasks import HUB_DATA, TASKS, Task, select_tasks

MOST_SEEDS, MOST_JOBS, MOST_EPOCHS, LARGEST_BATCH, LONGEST, HIGHEST_RATE = 1000, 10_000, 1000, 65_536, 131_072, 1e30
"""What options may ask for, at most; a learning rate may be any that fails by itself."""
BESIDE = ("untrained", "bag_of_words", "naive_bayes")
BASELINES = ("bag_of_words", "naive_bayes")
"""Arms without a network: one job chooses their setting among their own, and has no seed."""
Number = TypeVar("Number", int, float)
Setting = tuple[int, int, float]
"""Epochs, batch size, learning rate."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training on one task; its settings are what its name says."""

    arm: str
    """model, untrained, bag_of_words or naive_bayes."""
    task: str
    """The task's name."""
    choosing: bool = False
    """Whether it trains without a part of the training set and is scored on that part, and on nothing else."""
    epochs: int = 0
    """Passes over the training set; this and the following are 0 for a baseline, which has settings of its own."""
    batch_size: int = 0
    """Examples of one optimizer step."""
    lr: float = 0.0
    """Peak learning rate."""
    seed: int = 0
    """Seed of the head's weights, dropout and the order of the examples; of all weights where untrained."""

    @property
    def setting(self) -> Setting:
        """What a grid varies."""
        return self.epochs, self.batch_size, self.lr

    @property
    def name(self) -> str:
        """Its name, which is also that of its files."""
        if self.arm in BASELINES:
            return f"{self.task}-{self.arm}"
        arm = f"{self.arm}-choosing" if self.choosing else self.arm
        return f"{self.task}-{arm}-epochs{self.epochs}-batch{self.batch_size}-lr{self.lr:g}-seed{self.seed}"


@dataclass(kw_only=True)
class GlueConfig:
    """Fine-tuning on GLUE. The defaults are the hyper-parameters of Gong et al. 2019, task by task."""

    model: str
    """A run directory, whose last stage is taken, or a folder or hub name with a Hugging Face encoder."""
    tokenizer: str | None = None
    """A folder or hub name with its tokenizer; default: that of the model."""
    tasks: str = "all"
    """all, or names such as CoLA,SST-2."""
    data: str = HUB_DATA
    """A folder with GLUE's original TSV files (RTE/train.tsv and so on), or a hub data set."""
    output_dir: str = "runs/glue"
    """Results, report and submission; the same command goes on where it was stopped."""
    seeds: int = 5
    """Trainings of each task and setting; the report gives the median and range of the final ones, seeds 1, 2, ..."""
    beside: str = ""
    """What is measured beside the model: untrained (the same model with fresh weights), bag_of_words (word counts),
    naive_bayes (the same with naive-Bayes weights), or several."""
    choose_on: float = 0.1
    """Share of the training set that a grid's settings are chosen on, at least 250 examples, at most half; the chosen
    one is trained on all of it and scored once."""
    test_labels: bool = False
    """The test files have a column of labels: score them too, once."""
    epochs: str = ""
    """Passes over the training set; several, such as 3,4, make a grid, from which each arm chooses on a part of the
    training set. Default: the paper's for each task."""
    batch_size: str = ""
    """Examples of one optimizer step; several make a grid."""
    lr: str = ""
    """Peak learning rate; several make a grid."""
    dropout: float | None = None
    """Dropout of hidden states and attention in fine-tuning; default: that of the model's configuration."""
    max_length: int = 128
    """Longest input in tokens; a model that knows fewer positions takes no more than it knows."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, else fp32."""
    deepspeed_config: str = "ds_configs/zero0.json"
    """DeepSpeed configuration of every engine; batch sizes and precision in it stay "auto"."""

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise UserError(f"seeds is {self.seeds}; it must be 1 to {MOST_SEEDS:,}.")
        if not 8 <= self.max_length <= LONGEST:
            raise UserError(f"max_length is {self.max_length}; it must be 8 to {LONGEST:,}.")
        for name in ("model", "data", "deepspeed_config", *(["tokenizer"] if self.tokenizer is not None else [])):
            if not getattr(self, name).strip():
                raise UserError(f"{name} is {getattr(self, name)!r}; give a folder, file or hub name.")
        check_output_folder(self.output_dir, "output_dir")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must lie in [0, 1).")
        if not 0 < self.choose_on <= 0.5:
            raise UserError(f"choose_on is {self.choose_on}; it must lie above 0 and not above 0.5.")
        for arm in self.arms[1:]:
            if arm not in BESIDE:
                raise UserError(f"beside names {shown(arm)}; {nearest(arm, BESIDE)}")
        settings = math.prod(len(values) for values in self._grid())
        trainings = settings + 1 if settings > 1 else 1
        jobs = len(select_tasks(self.tasks)) * len(self.arms) * self.seeds * trainings
        if jobs > MOST_JOBS:
            raise UserError(f"The options ask for {jobs:,} trainings; ask for at most {MOST_JOBS:,} at a time.")

    @property
    def arms(self) -> list[str]:
        """What is measured, the model itself first."""
        return list(dict.fromkeys(["model", *(arm.strip() for arm in self.beside.split(",") if arm.strip())]))

    def settings(self, task: Task) -> list[Setting]:
        """The settings that each arm chooses from, in the order of the options; often only one."""
        return list(itertools.product(*self._grid(task)))

    def trials(self, task: Task, arm: str) -> list[Job]:
        """The trainings that a setting is chosen by; none where there is but one, or by a baseline's own job.

        Their seeds are no final training's: a setting that had luck with a seed does not meet that seed again.
        """
        settings = self.settings(task)
        if arm in BASELINES or len(settings) == 1:
            return []
        return [job for setting in settings for job in self._trainings(task, arm, setting, choosing=True)]

    def finals(self, task: Task, arm: str, setting: Setting) -> list[Job]:
        """The trainings on the whole training set at the setting that was chosen; each is scored once."""
        if arm in BASELINES:
            return [] if arm == "naive_bayes" and task.regression else [Job(arm=arm, task=task.name)]
        return self._trainings(task, arm, setting, choosing=False)

    def _trainings(self, task: Task, arm: str, setting: Setting, *, choosing: bool) -> list[Job]:
        epochs, batch_size, lr = setting
        first = MOST_SEEDS + 1 if choosing else 1
        return [
            Job(arm=arm, task=task.name, choosing=choosing, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
            for seed in range(first, first + self.seeds)
        ]

    def _grid(self, task: Task | None = None) -> tuple[list[int], list[int], list[float]]:
        """Epochs, batch sizes and learning rates that are tried; where an option is empty, the task's own."""
        own = task or next(iter(TASKS.values()))
        return (
            _numbers("epochs", self.epochs, int, MOST_EPOCHS) or [own.epochs],
            _numbers("batch_size", self.batch_size, int, LARGEST_BATCH) or [own.batch_size],
            _numbers("lr", self.lr, float, HIGHEST_RATE) or [own.lr],
        )


def _numbers(name: str, text: str, kind: Callable[[str], Number], most: float) -> list[Number]:
    """Read `2e-5,5e-5`."""
    try:
        if len(text) > 10_000 or not text.isascii() or "_" in text:
            raise ValueError
        numbers = [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        numbers = [kind("-1")]
    if not all(0 < number <= most for number in numbers):
        raise UserError(
            f"{name} is {shown(text)}; give a positive number, {most:,g} at most, or several with commas between them."
        )
    return list(dict.fromkeys(numbers))
