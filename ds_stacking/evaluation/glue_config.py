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
from ds_stacking.evaluation.glue_tasks import HUB_DATA, TASKS, Task, select_tasks

MOST_SEEDS, MOST_JOBS, MOST_EPOCHS, LARGEST_BATCH, LONGEST, HIGHEST_RATE = 1000, 10_000, 1000, 65_536, 131_072, 1e30
"""What options may ask for, at most; a learning rate may be any that fails by itself."""
BESIDE = ("untrained", "bag_of_words")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training on one task; its settings are what its name says."""

    arm: str
    """model, untrained or bag_of_words."""
    task: str
    """The task's name."""
    epochs: int
    """Passes over the training set."""
    batch_size: int
    """Examples of one optimizer step."""
    lr: float
    """Peak learning rate."""
    seed: int
    """Seed of the head's weights, dropout and the order of the examples; of all weights where untrained."""

    @property
    def name(self) -> str:
        """Its name, which is also that of its files."""
        if self.arm == "bag_of_words":
            return f"{self.task}-{self.arm}"
        return f"{self.task}-{self.arm}-epochs{self.epochs}-batch{self.batch_size}-lr{self.lr:g}-seed{self.seed}"


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
    """Trainings of each task and setting, with seeds 1, 2, ...; the report gives their median and range."""
    beside: str = ""
    """What is measured beside the model: untrained (the same model with fresh weights), bag_of_words, or both."""
    epochs: str = ""
    """Passes over the training set; several, such as 3,4, make a grid. Default: the paper's for each task."""
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
        for arm in self.arms[1:]:
            if arm not in BESIDE:
                raise UserError(f"beside names {shown(arm)}; {nearest(arm, BESIDE)}")
        jobs = (
            len(select_tasks(self.tasks))
            * len(self.arms)
            * self.seeds
            * math.prod(len(values) for values in self._grid())
        )
        if jobs > MOST_JOBS:
            raise UserError(f"The options ask for {jobs:,} trainings; ask for at most {MOST_JOBS:,} at a time.")

    @property
    def arms(self) -> list[str]:
        """What is measured, the model itself first."""
        return list(dict.fromkeys(["model", *(arm.strip() for arm in self.beside.split(",") if arm.strip())]))

    def jobs(self) -> list[Job]:
        """All jobs, task by task."""
        return [job for task in select_tasks(self.tasks) for job in self._task_jobs(task)]

    def _grid(self, task: Task | None = None) -> tuple[list[int], list[int], list[float]]:
        """Epochs, batch sizes and learning rates that are tried; where an option is empty, the task's own."""
        own = task or next(iter(TASKS.values()))
        return (
            _numbers("epochs", self.epochs, int, MOST_EPOCHS) or [own.epochs],
            _numbers("batch_size", self.batch_size, int, LARGEST_BATCH) or [own.batch_size],
            _numbers("lr", self.lr, float, HIGHEST_RATE) or [own.lr],
        )

    def _task_jobs(self, task: Task) -> list[Job]:
        grid = list(itertools.product(*self._grid(task)))
        jobs = []
        for arm in self.arms:
            fixed = arm == "bag_of_words"  # it has neither settings nor seeds
            for epochs, batch_size, lr in grid[:1] if fixed else grid:
                for seed in range(1, 2 if fixed else self.seeds + 1):
                    jobs.append(Job(arm=arm, task=task.name, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed))
        return jobs


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
