"""How a setting is chosen: the part of the training set, and that no development set has a say in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.studies.glue.choice import best_setting, held_out_mask, hold_out, mean_over_seeds
from ds_stacking.studies.glue.configuration import GlueConfig, Job
from ds_stacking.studies.glue.finetune import Outcome
from ds_stacking.studies.glue.run import GlueRun
from ds_stacking.studies.glue.task_data import Examples, TaskData, load_task
from ds_stacking.studies.glue.tasks import TASKS
from tests.studies.glue.glue_files import GOOD, write_encoder, write_task


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [(10_000, 0.1, 1000), (1000, 0.1, 250), (1000, 0.4, 400), (300, 0.1, 150), (3, 0.5, 1)],
)
def test_the_part_has_its_size_and_every_class_its_share(count: int, share: float, wanted: int) -> None:
    labels = np.random.default_rng(count).choice(3, count, p=[0.7, 0.2, 0.1])
    part = held_out_mask(labels.tolist(), share)
    assert part.shape == (count,) and part.sum() == wanted
    for one in range(3):
        assert abs(part[labels == one].sum() - wanted * (labels == one).mean()) <= 1
    assert (held_out_mask(labels.tolist(), share) == part).all(), "the same part, whoever asks"
    scores = np.random.default_rng(1).random(count) * 5
    taken = np.sort(scores[held_out_mask(scores.tolist(), share)])
    even = np.quantile(scores, (np.arange(wanted) + 0.5) / wanted)
    assert np.abs(taken - even).max() < 5 * 8 / count + 0.05 or count < 10, "scores are spread as in the whole"


def test_the_part_and_the_rest_are_the_training_set(tmp_path: Path) -> None:
    write_task(tmp_path, "RTE", train=65)
    data = load_task(TASKS["RTE"], str(tmp_path))
    parts = hold_out(data, 0.1)
    assert parts.test == {} and list(parts.dev) == ["held_out"]
    rows = [
        [*zip(*split.texts, split.labels, strict=True)] for split in (data.train, parts.train, parts.dev["held_out"])
    ]
    assert len(rows[2]) == 32 and sorted(rows[0]) == sorted(rows[1] + rows[2])
    with pytest.raises(UserError, match="2 examples has no part"):
        hold_out(TaskData(train=Examples(texts=(["a", "b"],), labels=[0, 1]), dev={}, test={}, notes=[]), 0.1)


def test_the_first_of_the_best_is_chosen_and_nothing_that_failed() -> None:
    assert best_setting({"a": 1.0, "b": 2.0, "c": 2.0, "d": None}) == "b"
    assert best_setting({"a": None}) is None
    assert mean_over_seeds([1.0, 2.0, 6.0]) == 3.0 and mean_over_seeds([1.0, None]) is None


def rule(job: Job, data: TaskData, *_: Any, **__: Any) -> Outcome:
    """A training in make-believe: at the rate 1e-3 it has found the rule, at the others the opposite of it."""
    seen.append((job, data))
    scores = {}
    for name, split in data.dev.items():
        right = np.mean([any(word in text for word in GOOD) == label for text, label in
                         zip(split.texts[0], split.labels, strict=True)])  # fmt: skip
        scores[name] = {"accuracy": 100 * float(right if job.lr == 1e-3 else 1 - right)}
    return Outcome(scores=scores, predictions={}, train_loss=0.1)


seen: list[tuple[Job, TaskData]] = []


def run(folder: Path, name: str, **seams: Any) -> tuple[list[Job], dict[str, Any]]:
    """All jobs of a choice among three rates; the trainings in their order and what choices.json says."""
    seen.clear()
    config = GlueConfig(
        model=str(folder / "m"), data=str(folder / "glue"), output_dir=str(folder / name), tasks="SST-2", seeds=2,
        lr="1e-4,1e-3,1e-2", beside="untrained",
    )  # fmt: skip
    one = GlueRun(config, train=rule, **seams)
    one.make_folder()
    one.run()
    names = one.finish()
    assert {path.stem for path in (folder / name / "results").glob("*.json")} == set(names)
    return [job for job, _ in seen], json.loads((folder / name / "choices.json").read_text())


def flip_labels(path: Path) -> None:
    """A development set that says the opposite."""
    header, *lines = path.read_text().splitlines()
    flipped = [f"{text}\t{1 - int(label)}" for text, label in (line.split("\t") for line in lines)]
    path.write_text("\n".join([header, *flipped]) + "\n")


def test_the_development_set_has_no_say_in_what_is_chosen(tmp_path: Path) -> None:
    write_encoder(tmp_path / "m")
    dev = write_task(tmp_path / "glue", "SST-2") / "dev.tsv"
    jobs, choices = run(tmp_path, "as it is")
    told = set(dev.read_text().splitlines()[1:])
    for job, data in seen:
        texts = {f"{text}\t{int(label)}" for split in data.dev.values() for text, label in
                 zip(split.texts[0], split.labels, strict=True)}  # fmt: skip
        assert (texts == told) is not job.choosing and (not job.choosing or not texts & told)
    finals = [(job.arm, job.lr, job.seed) for job in jobs if not job.choosing]
    assert finals == [(arm, 1e-3, seed) for arm in ("model", "untrained") for seed in (1, 2)]
    flip_labels(dev)
    assert run(tmp_path, "flipped") == (jobs, choices)

    def peek(data: TaskData, share: float) -> TaskData:
        return TaskData(train=data.train, dev={"held_out": data.dev["dev"]}, test={}, notes=[])

    peeking, other = run(tmp_path, "peeking", hold_out=peek)
    assert peeking != jobs and other != choices, "a choice on the development set would have been noticed"


def test_choices_go_on_and_are_not_made_twice(tmp_path: Path) -> None:
    write_encoder(tmp_path / "m")
    write_task(tmp_path / "glue", "SST-2")
    jobs, choices = run(tmp_path, "out")
    assert run(tmp_path, "out") == ([], choices)
    lost = [jobs[0], jobs[-1]]
    assert [job.choosing for job in lost] == [True, False]
    for job in lost:
        (tmp_path / "out" / "results" / f"{job.name}.json").unlink()
    assert run(tmp_path, "out") == (lost, choices)
    (choice, _) = choices["choices"]
    assert choice["setting"] == {"epochs": 3, "batch_size": 16, "lr": 1e-3} and choice["examples"] == 32
    assert [(one["lr"], score) for one, score in choice["scores"]] == [(1e-4, 0), (1e-3, 100), (1e-2, 0)]
