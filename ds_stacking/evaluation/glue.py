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
from ds_stacking.evaluation.glue_baseline import linear_words
from ds_stacking.evaluation.glue_choice import HELD_OUT, Choice, best_setting, divide, mean_over_seeds, mean_score
from ds_stacking.evaluation.glue_config import BASELINES, GlueConfig, Job, Setting
from ds_stacking.evaluation.glue_data import NEVER_LABELLED, TaskData, load_task
from ds_stacking.evaluation.glue_finetune import Encoder, Outcome, finetune, load_encoder
from ds_stacking.evaluation.glue_tasks import TASKS, Task, select_tasks

COMPARABLE = ("model", "tokenizer", "data", "max_length", "precision", "dropout", "choose_on", "test_labels")
"""Fields of the configuration that all results of one folder share."""
PROTOCOL = "settings chosen on a part of the training set"
"""What else they share; folders of versions that chose on the development set lack it."""
POLL_SECONDS = 1.0


class Result(TypedDict):
    """results/<job>.json: what is read of it to go on."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    arm: str
    task: str
    choosing: bool
    epochs: int
    batch_size: int
    lr: float
    seed: int
    failed: NotRequired[str]
    scores: NotRequired[dict[str, dict[str, Finite]]]
    test_scores: NotRequired[dict[str, dict[str, Finite]]]
    choice: NotRequired[Choice]


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
        self.data = lru_cache(maxsize=1)(
            lambda name: load_task(TASKS[name], config.data, test_labels=config.test_labels)
        )
        self.divided = lru_cache(maxsize=1)(lambda name: divide(self.data(name), config.choose_on))
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

    def claim(self) -> None:
        """Make the output folder. Raises UserError where it holds results that these could not stand beside."""
        self.folder.mkdir(parents=True, exist_ok=True)
        make_inside(self.folder, "results")
        refuse_links(self.folder / "results", (".config.lock", *(f".{job.name}.lock" for job in self.possible())))
        with FileLock(self.folder / "results" / ".config.lock"):
            self.check_results()
            write_json(self.folder / "config.json", self.comparable(), inside=self.folder)

    def work(self) -> None:
        """Take jobs until none is free; a choice is waited for, since it brings more.

        Rank 0 stays until all are settled, and takes those of ranks that died.
        """
        known: list[Job] = []
        while True:
            before, known = known, self.jobs()
            for job in known:
                with self.take(job) as mine:
                    if mine:
                        self.do(job)
            awaited = [job for job in known if self.rank == 0 or job.choosing]
            if all(self.settled(job) for job in awaited) and self.jobs() == known:
                return
            if known == before:
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
        found = [result.get("scores", {}), result.get("test_scores", {})]
        figures = [{name: set(scores) for name, scores in sets.items()} for sets in found]
        whole = "failed" in result or figures == self.expected(job)
        if not whole or any(result.get(name) != value for name, value in asdict(job).items()):
            raise UserError(f"{path} is not the result of that training; {mend}.")
        return result

    def expected(self, job: Job) -> list[dict[str, set[str]]]:
        """Sets that a job is scored on, with their metrics: those of a choice or of development, and those of test."""
        task = TASKS[job.task]
        tests = [name for name in task.test if name != NEVER_LABELLED and self.config.test_labels and not job.choosing]
        names = [[HELD_OUT] if job.choosing else task.dev, tests]
        return [{name: set(task.metrics) for name in sets} for sets in names]

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
            outcome, more = self.compute(job)
        except UserError:  # a model without all its weights, say: the other jobs would meet it too
            raise
        except Exception as error:
            failed = plain(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            write_json(self.path(job), asdict(job) | {"failed": failed}, inside=self.folder)
            self.say(f"{job.name} failed: {failed}")
            return
        seconds = time.monotonic() - start
        self.write_predictions(job, outcome)
        result = {"scores": outcome.scores, "test_scores": outcome.test_scores, **more, "seconds": round(seconds, 1)}
        write_json(self.path(job), asdict(job) | result, inside=self.folder)
        shown = "; ".join(
            f"{name} " + ", ".join(f"{metric} {value:.1f}" for metric, value in values.items())
            for name, values in (outcome.scores | outcome.test_scores).items()
        )
        self.say(f"{job.name}: {shown} ({seconds:.0f} s)")

    def compute(self, job: Job) -> tuple[Outcome, dict[str, Any]]:
        """Train and evaluate one job; what it left beside scores. A job that chooses sees no development set."""
        data: TaskData = self.divided(job.task) if job.choosing else self.data(job.task)
        if job.arm in BASELINES:
            weighted = job.arm == "naive_bayes"
            scores, test_scores, choice = linear_words(TASKS[job.task], data, self.config.choose_on, weighted=weighted)
            outcome = Outcome(scores=scores, predictions={}, train_loss=float("nan"), test_scores=test_scores)
            return outcome, {"choice": choice}
        outcome = finetune(job, data, self.encoder, self.ds_config, bf16=self.bf16)
        examples = {name: len(split) for name, split in (data.dev | data.test).items() if split.labels}
        return outcome, {"train_loss": outcome.train_loss, "examples": examples}

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

    def finish(self) -> list[str]:
        """Write choices.json, which the report reads; returns the names of all trainings that the report is about."""
        choices: list[Choice] = []
        for task, arm in self.arms():
            if arm in BASELINES:
                results = [self.result(job) for job in self.config.finals(task, arm, (0, 0, 0.0))]
                choices += [result["choice"] for result in results if result and "choice" in result]
            elif setting := self.chosen(task, arm):
                tried = self.tried(task, arm)
                choices.append(
                    Choice(
                        task=task.name,
                        arm=arm,
                        setting=_named(setting),
                        examples=len(self.divided(task.name).dev[HELD_OUT]) if tried else 0,
                        seeds=self.config.seeds,
                        scores=[(_named(one), score) for one, score in tried.items()],
                    )
                )
        write_json(self.folder / "choices.json", {"choices": choices}, inside=self.folder)
        return [job.name for job in self.jobs()]


def _named(setting: Setting) -> dict[str, float]:
    return dict(zip(("epochs", "batch_size", "lr"), setting, strict=True))


def run_glue(config: GlueConfig) -> list[str] | None:
    """Run all jobs of `config`; every rank calls it. Rank 0 gets their names, when all jobs are settled."""
    limit_threads()
    keep_freed_memory()
    run = GlueRun(config)
    run.check_results()
    run.check_data()
    with writing(run.folder):
        run.claim()
        init_distributed(alone=True)
        run.work()
        return run.finish() if run.rank == 0 else None
