"""Fine-tuning on GLUE: jobs that the ranks share by taking the next that nobody has, each in an engine of its own.

GLUE's batches of 16 or 32 are too small to be split over GPUs, but every task, setting and seed is a training by
itself. So each rank trains alone: ranks need not wait for each other, results do not depend on their number, and one
that dies leaves its job to the others. Jobs are held by file locks, which end with their process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ds_stacking.common.environment import rank
from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json, write_text
from ds_stacking.engine.ds_config import load_ds_config
from ds_stacking.engine.factory import init_distributed, native_bf16
from ds_stacking.engine.host import keep_freed_memory, limit_threads
from ds_stacking.evaluation.glue_baseline import bag_of_words
from ds_stacking.evaluation.glue_config import GlueConfig, Job
from ds_stacking.evaluation.glue_data import TaskData, load_task
from ds_stacking.evaluation.glue_finetune import Encoder, Outcome, finetune, load_encoder
from ds_stacking.evaluation.glue_tasks import TASKS, select_tasks

COMPARABLE = ("model", "tokenizer", "data", "max_length", "precision", "dropout")
"""Fields of the configuration that all results of one folder share."""
POLL_SECONDS = 1.0


class GlueRun:
    """The jobs of a configuration on one rank, and what they have left in the output folder."""

    def __init__(self, config: GlueConfig) -> None:
        self.config = config
        self.rank = rank()
        self.folder = Path(config.output_dir)
        self.ds_config = load_ds_config(config.deepspeed_config)
        self.encoder: Encoder = load_encoder(config.model, config.tokenizer, config.max_length, config.dropout)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16()[0])
        # of the last task only: jobs come task by task
        self.data = lru_cache(maxsize=1)(lambda name: load_task(TASKS[name], config.data))
        self.started = time.time()

    def check_data(self) -> None:
        """Read every task before any is trained. Raises UserError for what is missing or wrong."""
        for task in select_tasks(self.config.tasks):
            for note in self.data(task.name).notes:
                self.say(note)

    def claim(self) -> None:
        """Make the output folder. Raises UserError where it holds results that these could not stand beside."""
        own = {name: value for name, value in asdict(self.config).items() if name in COMPARABLE}
        path = self.folder / "config.json"
        (self.folder / "results").mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "results" / ".config.lock"):
            if path.is_file():
                other = json.loads(path.read_text())
                for name, value in own.items():
                    if other.get(name) != value:
                        raise UserError(
                            f"{self.folder} holds results with {name} {other.get(name)!r}, not {value!r}; "
                            f"choose another --output_dir."
                        )
            write_json(path, own)

    def work(self) -> None:
        """Take jobs until none is free; rank 0 stays until all are settled, and takes those of ranks that died."""
        jobs = self.config.jobs()
        while True:
            for job in jobs:
                with self.take(job) as mine:
                    if mine:
                        self.do(job)
            if self.rank != 0 or all(self.settled(job) for job in jobs):
                return
            time.sleep(POLL_SECONDS)

    def settled(self, job: Job) -> bool:
        """Whether the job is done, or failed since this process began."""
        path = self.path(job)
        return path.is_file() and ("failed" not in _read(path) or path.stat().st_mtime >= self.started)

    @contextmanager
    def take(self, job: Job) -> Iterator[bool]:
        """Hold a job; False where it is settled or another rank holds it."""
        lock = FileLock(self.folder / "results" / f".{job.name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield not self.settled(job)
        finally:
            lock.release()

    def do(self, job: Job) -> None:
        """Train and evaluate one job and write its result; what fails at run time is its result, and others go on."""
        start = time.monotonic()
        try:
            outcome = self.compute(job)
        except UserError:  # a model without all its weights, say: the other jobs would meet it too
            raise
        except Exception as error:
            failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            write_json(self.path(job), asdict(job) | {"failed": failed})
            self.say(f"{job.name} failed: {failed}")
            return
        seconds = time.monotonic() - start
        self.write_predictions(job, outcome)
        result = {"scores": outcome.scores, "train_loss": outcome.train_loss, "seconds": round(seconds, 1)}
        write_json(self.path(job), asdict(job) | result)
        shown = "; ".join(
            f"{name} " + ", ".join(f"{metric} {value:.1f}" for metric, value in values.items())
            for name, values in outcome.scores.items()
        )
        self.say(f"{job.name}: {shown} ({seconds:.0f} s)")

    def compute(self, job: Job) -> Outcome:
        """Train and evaluate one job."""
        data: TaskData = self.data(job.task)
        if job.arm == "bag_of_words":
            return Outcome(scores=bag_of_words(TASKS[job.task], data), predictions={}, train_loss=float("nan"))
        return finetune(job, data, self.encoder, self.ds_config, bf16=self.bf16)

    def write_predictions(self, job: Job, outcome: Outcome) -> None:
        """Write the answers to the test sets in the format of the official server: index, tab, prediction."""
        labels = TASKS[job.task].labels
        for name, predictions in outcome.predictions.items():
            path = self.folder / "predictions" / job.name / f"{name}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = self.data(job.task).test[name].ids
            words = [labels[int(value)] if labels else f"{min(5.0, max(0.0, value)):.3f}" for value in predictions]
            rows = [f"{index}\t{word}\n" for index, word in zip(ids, words, strict=True)]
            write_text(path, "".join(["index\tprediction\n", *rows]))

    def path(self, job: Job) -> Path:
        """The file of a job's result."""
        return self.folder / "results" / f"{job.name}.json"

    def say(self, text: str) -> None:
        """One line for a person."""
        print(f"[rank {self.rank}] {text}", flush=True)


def run_glue(config: GlueConfig) -> bool:
    """Run all jobs of `config`; every rank calls it. True on rank 0, when all jobs are settled."""
    limit_threads()
    keep_freed_memory()
    run = GlueRun(config)
    run.check_data()
    run.claim()
    init_distributed(alone=True)
    run.work()
    return run.rank == 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
