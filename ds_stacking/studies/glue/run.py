"""Fine-tuning on GLUE: jobs that the ranks share by taking the next that nobody has, each in an engine of its own.

GLUE's batches of 16 or 32 are too small to be split over GPUs, but every task, setting and seed is a training by
itself. So each rank trains alone: ranks need not wait for each other, results do not depend on their number, and one
that dies leaves its job to the others. Jobs are held by file locks, which end with their process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from filelock import FileLock, Timeout

from ds_stacking.common.environment import rank
from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json, write_text
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside
from ds_stacking.common.words import plain
from ds_stacking.engine.ds_config import load_ds_config
from ds_stacking.engine.factory import init_distributed, native_bf16
from ds_stacking.engine.host import keep_freed_memory, limit_threads
from ds_stacking.studies.glue.baseline import train_baseline
from ds_stacking.studies.glue.choice import hold_out
from ds_stacking.studies.glue.configuration import BASELINES, GlueConfig, Job
from ds_stacking.studies.glue.finetune import Encoder, Outcome, finetune, load_encoder
from ds_stacking.studies.glue.results import GlueResults
from ds_stacking.studies.glue.task_data import TaskData, load_task
from ds_stacking.studies.glue.tasks import TASKS, select_tasks

POLL_SECONDS = 1.0


class GlueRun(GlueResults):
    """The jobs of a configuration on one rank, done and written into the output folder."""

    def __init__(
        self,
        config: GlueConfig,
        *,
        train: Callable[..., Outcome] = finetune,
        hold_out: Callable[[TaskData, float], TaskData] = hold_out,
    ) -> None:
        super().__init__(config)
        self.train = train
        self.rank = rank()
        self.ds_config = load_ds_config(config.deepspeed_config)
        self.encoder: Encoder = load_encoder(config.model, config.tokenizer, config.max_length, config.dropout)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16()[0])
        # of the last task only: jobs come task by task
        self.data = lru_cache(maxsize=1)(
            lambda name: load_task(TASKS[name], config.data, test_labels=config.test_labels)
        )
        self.held_out = lru_cache(maxsize=1)(lambda name: hold_out(self.data(name), config.choose_on))

    def check_data(self) -> None:
        """Read every task before any is trained. Raises UserError for what is missing or wrong."""
        for task in select_tasks(self.config.tasks):
            for note in self.data(task.name).notes:
                self.log(note)

    def run(self) -> None:
        """Take jobs until none is free; a choice is waited for, since it brings more.

        Rank 0 stays until all are settled, and takes those of ranks that died.
        """
        known: list[Job] = []
        while True:
            before, known = known, self.jobs()
            for job in known:
                with self.claim_job(job) as mine:
                    if mine:
                        self.run_job(job)
            awaited = [job for job in known if self.rank == 0 or job.choosing]
            if all(self.settled(job) for job in awaited) and self.jobs() == known:
                return
            if known == before:
                time.sleep(POLL_SECONDS)

    @contextmanager
    def claim_job(self, job: Job) -> Iterator[bool]:
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

    def run_job(self, job: Job) -> None:
        """Train and evaluate one job and write its result; what fails at run time is its result, and others go on."""
        start = time.monotonic()
        try:
            # a job that chooses is given no development set
            data = self.held_out(job.task) if job.choosing else self.data(job.task)
            outcome, more = self.compute(job, data)
        except UserError:  # a model without all its weights, say: the other jobs would meet it too
            raise
        except Exception as error:
            failed = plain(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            write_json(self.path(job), asdict(job) | {"failed": failed}, inside=self.folder)
            self.log(f"{job.name} failed: {failed}")
            return
        seconds = time.monotonic() - start
        self.write_predictions(job, outcome)
        result = {"scores": outcome.scores, "test_scores": outcome.test_scores, "train_loss": outcome.train_loss}
        examples = {name: len(split) for name, split in (data.dev | data.test).items() if split.labels}
        more |= {"examples": examples, "seconds": round(seconds, 1)}
        write_json(self.path(job), asdict(job) | result | more, inside=self.folder)
        shown = "; ".join(
            f"{name} " + ", ".join(f"{metric} {value:.1f}" for metric, value in values.items())
            for name, values in (outcome.scores | outcome.test_scores).items()
        )
        self.log(f"{job.name}: {shown} ({seconds:.0f} s)")

    def compute(self, job: Job, data: TaskData) -> tuple[Outcome, dict[str, Any]]:
        """Train and evaluate one job; what a baseline chose."""
        if job.arm not in BASELINES:
            return self.train(job, data, self.encoder, self.ds_config, bf16=self.bf16), {}
        weighted = job.arm == "naive_bayes"
        scores, test_scores, choice = train_baseline(TASKS[job.task], data, self.config.choose_on, weighted=weighted)
        return Outcome(scores=scores, predictions={}, test_scores=test_scores), {"choice": choice}

    def write_predictions(self, job: Job, outcome: Outcome) -> None:
        """Write the answers to the test sets in the format of the official server: index, tab, prediction."""
        labels = TASKS[job.task].labels
        for name, predictions in outcome.predictions.items():
            path = self.folder / "predictions" / job.name / f"{name}.tsv"
            make_inside(self.folder, "predictions", job.name)
            ids = self.data(job.task).test[name].ids
            words = [labels[int(value)] if labels else f"{min(5.0, max(0.0, value)):.3f}" for value in predictions]
            rows = [f"{index}\t{word}\n" for index, word in zip(ids, words, strict=True)]
            write_text(path, "".join(["index\tprediction\n", *rows]), inside=self.folder)

    def log(self, text: str) -> None:
        """One line for a person."""
        print(f"[rank {self.rank}] {text}", flush=True)


def run_glue(config: GlueConfig) -> list[str] | None:
    """Run all jobs of `config`; every rank calls it. Rank 0 gets their names, when all jobs are settled."""
    limit_threads()
    keep_freed_memory()
    run = GlueRun(config)
    run.check_results()
    run.check_data()
    with writing(run.folder):
        run.make_folder()
        init_distributed(alone=True)
        run.run()
        return run.finish() if run.rank == 0 else None
