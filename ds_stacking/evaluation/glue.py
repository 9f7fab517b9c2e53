"""Fine-tuning on GLUE: jobs that the ranks share by taking the next that nobody has, each in an engine of its own.

GLUE's batches of 16 or 32 are too small to be split over GPUs, but every task, setting and seed is a training by
itself. So each rank trains alone: ranks need not wait for each other, results do not depend on their number, and one
that dies leaves its job to the others. Jobs are held by file locks, which end with their process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from ds_stacking.common.environment import rank
from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_json, write_text
from ds_stacking.common.json_files import KEEP_OTHERS, Finite, read_json
from ds_stacking.common.outputs import writing
from ds_stacking.common.own_files import make_inside, refuse_links
from ds_stacking.common.words import plain, shown
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


class Result(TypedDict):
    """results/<job>.json: what is read of it to go on."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    arm: str
    task: str
    epochs: int
    batch_size: int
    lr: float
    seed: int
    failed: NotRequired[str]
    scores: NotRequired[dict[str, dict[str, Finite]]]


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
        for name, value in self.comparable().items():
            if other.get(name) != value:
                raise UserError(
                    f"{self.folder} holds results with {name} {shown(other.get(name))}, not {shown(value)}; "
                    f"choose another --output_dir."
                )
        for job in self.config.jobs():
            self.result(job)

    def comparable(self) -> dict[str, Any]:
        """What all results of the folder share."""
        return {name: value for name, value in asdict(self.config).items() if name in COMPARABLE}

    def claim(self) -> None:
        """Make the output folder. Raises UserError where it holds results that these could not stand beside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        make_inside(self.folder, "results")
        refuse_links(self.folder / "results", (".config.lock", *(f".{job.name}.lock" for job in self.config.jobs())))
        with FileLock(self.folder / "results" / ".config.lock"):
            self.check_results()
            write_json(self.folder / "config.json", self.comparable(), inside=self.folder)

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
        result = self.result(job)
        return result is not None and ("failed" not in result or self.path(job).stat().st_mtime >= self.started)

    def result(self, job: Job) -> Result | None:
        """What the job left; None where it has not been done. Raises UserError for what is no result of this job."""
        path, mend = self.path(job), "delete it, and the same command does that training again"
        try:
            result = read_json(path, Result, mend=mend, inside=self.folder)
        except FileNotFoundError:
            return None
        task, found = TASKS[job.task], result.get("scores", {})
        expected = {name: set(task.metrics) for name in task.dev}
        whole = "failed" in result or {name: set(scores) for name, scores in found.items()} == expected
        if not whole or any(result.get(name) != value for name, value in asdict(job).items()):
            raise UserError(f"{path} is not the result of that training; {mend}.")
        return result

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
            failed = plain(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            write_json(self.path(job), asdict(job) | {"failed": failed}, inside=self.folder)
            self.say(f"{job.name} failed: {failed}")
            return
        seconds = time.monotonic() - start
        self.write_predictions(job, outcome)
        result = {"scores": outcome.scores, "train_loss": outcome.train_loss, "seconds": round(seconds, 1)}
        write_json(self.path(job), asdict(job) | result, inside=self.folder)
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
            make_inside(self.folder, "predictions", job.name)
            ids = self.data(job.task).test[name].ids
            words = [labels[int(value)] if labels else f"{min(5.0, max(0.0, value)):.3f}" for value in predictions]
            rows = [f"{index}\t{word}\n" for index, word in zip(ids, words, strict=True)]
            write_text(path, "".join(["index\tprediction\n", *rows]), inside=self.folder)

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
    run.check_results()
    run.check_data()
    with writing(run.folder):
        run.claim()
        init_distributed(alone=True)
        run.work()
    return run.rank == 0
