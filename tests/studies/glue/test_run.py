"""Fine-tuning on GLUE: jobs, schedule, inputs, checks of the model; and real trainings in a real engine."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_stacking.common.errors import UserError
from ds_stacking.studies.glue.configuration import GlueConfig, Job
from ds_stacking.studies.glue.finetune import (
    Outcome,
    build_classifier,
    collate,
    epoch_batches,
    learning_rate,
    load_encoder,
    with_dropout,
)
from ds_stacking.studies.glue.run import GlueRun
from ds_stacking.studies.glue.task_data import load_task
from ds_stacking.studies.glue.tasks import TASKS, select_tasks
from tests.ranks import run_ranks
from tests.studies.glue.glue_files import write_encoder, write_task


def trainings(config: GlueConfig) -> list[Job]:
    """Final trainings of a configuration that has one setting for each task."""
    return [
        job for task in select_tasks(config.tasks) for job in config.finals(task, "model", config.settings(task)[0])
    ]


def test_trainings_are_at_the_paper_s_settings_or_choose_from_a_grid() -> None:
    config = GlueConfig(model="m", tasks="CoLA,RTE,QQP", seeds=2)
    assert [(j.task, j.epochs, j.batch_size, j.lr, j.seed) for j in trainings(config)] == [
        *(("CoLA", 3, 16, 5e-5, seed) for seed in (1, 2)),
        *(("RTE", 4, 16, 3e-5, seed) for seed in (1, 2)),
        *(("QQP", 4, 32, 5e-5, seed) for seed in (1, 2)),
    ]
    rte = TASKS["RTE"]
    assert config.trials(rte, "model") == [], "nothing to choose from"
    grid = GlueConfig(model="m", tasks="RTE", lr="1e-5,2e-5", epochs="3,4", beside="untrained,bag_of_words")
    trials = [job for arm in grid.arms for job in grid.trials(rte, arm)]
    finals = [job for arm in grid.arms for job in grid.finals(rte, arm, (4, 16, 2e-5))]
    assert len(trials) == 2 * 4 * 5 and len(finals) == 2 * 5 + 1
    assert len({job.name for job in [*trials, *finals]}) == len(trials) + len(finals)
    assert all(job.choosing for job in trials) and not any(job.choosing for job in finals)
    assert not {job.seed for job in trials} & {job.seed for job in finals}
    assert {(job.epochs, job.lr) for job in finals} == {(4, 2e-5), (0, 0.0)}
    scores = GlueConfig(model="m", tasks="STS-B", beside="naive_bayes")
    assert scores.finals(TASKS["STS-B"], "naive_bayes", (1, 1, 1.0)) == [], "scores have no classes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0"}, "lr is '0'"),
        ({"batch_size": "16,x"}, "batch_size is '16,x'"),
        ({"lr": "inf"}, "lr is 'inf'"),
        ({"beside": "untrianed"}, "did you mean untrained"),
        ({"seeds": 0}, "seeds is 0"),
        ({"choose_on": 0.0}, "choose_on is 0.0"),
        ({"choose_on": 0.7}, "choose_on is 0.7"),
        ({"choose_on": float("nan")}, "choose_on is nan"),
        ({"max_length": 4}, "max_length is 4"),
        ({"seeds": 10**9}, "seeds is 1000000000; it must be 1 to 1,000"),
        ({"epochs": "nan"}, "epochs is 'nan'"),
        ({"epochs": "inf"}, "epochs is 'inf'"),
        ({"epochs": "1000000000"}, "1,000 at most"),
        ({"epochs": "٣"}, "epochs is '٣'"),
        ({"lr": "9" * 5000}, "lr is '999"),
        ({"epochs": ",".join(map(str, range(1, 101))), "seeds": 1000}, "ask for 909,000 trainings"),
        ({"max_length": 10**12}, "max_length is 1000000000000"),
        ({"model": ""}, "model is ''"),
        ({"data": " "}, "data is ' '"),
        ({"tokenizer": ""}, "tokenizer is ''"),
        ({"output_dir": ""}, "output_dir is ''"),
        ({"output_dir": "pyproject.toml"}, "is no folder"),
        ({"output_dir": "x" * 10_000}, "File name too long"),
        ({"tasks": ""}, "--tasks names ''"),
        ({"tasks": "RTF"}, "did you mean RTE"),
        ({"tasks": "SQuAD"}, "'SQuAD', which is no task"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GlueConfig(**{"model": "m"} | options)


def test_the_learning_rate_rises_for_a_tenth_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 50, 1.0) for step in range(50)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == pytest.approx([(50 - step) / 45 for step in range(5, 50)])
    assert learning_rate(0, 1, 1.0) == 1.0


def test_inputs_are_padded_cut_and_swapped(tmp_path: Path) -> None:
    encoder = load_encoder(str(write_encoder(tmp_path / "m")), None, 12)
    write_task(tmp_path / "glue", "MRPC")
    train = load_task(TASKS["MRPC"], str(tmp_path / "glue")).train
    inputs, labels = collate(train, [0, 1, 2], encoder)
    assert inputs["input_ids"].shape == (3, 12) and labels is not None
    assert labels.tolist() == train.labels[:3]
    swapped, _ = collate(train, [0, 1], encoder, torch.tensor([True, False]).numpy())
    by_hand = encoder.tokenizer(train.texts[1][0], train.texts[0][0], truncation=True, max_length=12)
    assert swapped["input_ids"][0].tolist() == by_hand["input_ids"]
    assert torch.equal(swapped["input_ids"][1], inputs["input_ids"][1])
    (job,) = trainings(GlueConfig(model="m", tasks="MRPC", seeds=1))
    lengths = np.arange(100) // 10
    epochs = [list(epoch_batches(job, TASKS["MRPC"], lengths, epoch)) for epoch in (0, 0, 1)]
    for batches in epochs:
        assert sorted(int(row) for rows, _ in batches for row in rows) == list(range(100))
        assert all(np.ptp(lengths[rows]) <= 2 for rows, _ in batches), "alike in length"
        assert 20 < sum(int(flags.sum()) for _, flags in batches if flags is not None) < 80
    orders = [[int(row) for rows, _ in batches for row in rows] for batches in epochs]
    assert orders[0] == orders[1] != orders[2]


def test_a_bad_model_is_one_sentence(tmp_path: Path) -> None:
    good = write_encoder(tmp_path / "good")
    assert load_encoder(str(good), None, 128).max_length == 32
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((good / name).read_bytes())
    with pytest.raises(UserError, match="bare holds no tokenizer"):
        load_encoder(str(bare), None, 128)
    large = write_encoder(tmp_path / "large", words=["more", "words"])
    with pytest.raises(UserError, match="give the model's own"):
        load_encoder(str(bare), str(large), 128)
    assert load_encoder(str(bare), str(good), 128).source == str(bare)
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_encoder(str(tmp_path / "nowhere"), None, 128)
    break_encoder(bare)
    with pytest.raises(UserError, match="lacks bert.encoder.layer.0.output.dense.weight"):
        build_classifier(load_encoder(str(bare), str(good), 128), 2, untrained=False)


def test_an_untrained_model_shares_no_weight_with_the_trained_one(tmp_path: Path) -> None:
    encoder = load_encoder(str(write_encoder(tmp_path / "m")), None, 32)
    models = {}
    for untrained in (False, True):
        torch.manual_seed(3)
        models[untrained] = dict(build_classifier(encoder, 3, untrained=untrained).named_parameters())
    assert models[False].keys() == models[True].keys()
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"):
        assert torch.equal(models[False][name], stored[name])
        assert not torch.equal(models[True][name], stored[name])
        assert models[True][name].std().item() == pytest.approx(0.2, rel=0.2)  # the model's own initialisation


@pytest.mark.parametrize("untrained", [False, True])
def test_dropout_is_the_models_or_what_is_asked_for(tmp_path: Path, untrained: bool) -> None:
    source = str(write_encoder(tmp_path / "m"))
    for asked, expected in ((None, {0.1}), (0.4, {0.4})):
        model = build_classifier(load_encoder(source, None, 32, asked), 2, untrained=untrained)
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == expected
    with pytest.raises(UserError, match="No rate of dropout is known in a bare configuration"):
        with_dropout(SimpleNamespace(model_type="bare"), 0.1)


def break_encoder(folder: Path) -> None:
    """Take one weight out of the file."""
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fine_tunings(folder: Path) -> dict[str, Any]:
    """Run jobs of three kinds of task, then a choice of which one training fails; then all of them again."""
    options = {"model": str(folder / "m"), "data": str(folder / "glue"), "output_dir": str(folder / "out")}
    whole = GlueConfig(**options, seeds=1, tasks="SST-2,STS-B,MNLI", lr="5e-3", epochs="12", batch_size="8")
    failing = GlueConfig(**options, seeds=1, tasks="SST-2", lr="1e-2,1e30", epochs="1")
    first, last = {}, {}
    for times in (first, last):
        for config in (whole, failing):
            run = GlueRun(config)
            run.check_data()
            run.make_folder()
            run.run()
        files = sorted((folder / "out" / "results").glob("*.json"))
        times |= {path.stem: path.stat().st_mtime_ns for path in files}
    refused = []
    for config in (
        GlueConfig(**options, tasks="SST-2", max_length=9),
        GlueConfig(**options | {"model": str(folder / "broken"), "output_dir": str(folder / "other")}, tasks="SST-2"),
    ):
        try:
            run = GlueRun(config)
            run.make_folder()
            run.run()
        except UserError as error:
            refused.append(str(error))
    return {
        "results": {path.stem: json.loads(path.read_text()) for path in files},
        "changed": [name for name in last if first[name] != last[name]],
        "refused": refused,
    }


@pytest.mark.distributed
def test_trainings_learn_fail_alone_and_are_not_repeated(tmp_path: Path) -> None:
    write_encoder(tmp_path / "m")
    break_encoder(write_encoder(tmp_path / "broken"))
    for task in ("SST-2", "STS-B", "MNLI"):
        write_task(tmp_path / "glue", task, train=128)
    (outcome,) = run_ranks(1, fine_tunings, tmp_path)
    results = outcome["results"]
    assert len(results) == 3 + 2 + 1
    (failed,) = (name for name, result in results.items() if "failed" in result)
    assert "choosing" in failed and "1e+30" in failed and "not finite" in results[failed]["failed"]
    assert outcome["changed"] == [failed], "what failed is tried again, what is done is kept"
    (chosen,) = (result for result in results.values() if result["epochs"] == 1 and not result["choosing"])
    assert chosen["lr"] == 1e-2, "what failed is not chosen"
    done = {r["task"]: r for r in results.values() if r["epochs"] == 12}
    other_settings, broken = outcome["refused"]
    assert "max_length 128, not 9" in other_settings and "lacks bert.encoder.layer.0" in broken
    assert done["SST-2"]["scores"]["dev"]["accuracy"] > 75
    assert done["STS-B"]["scores"]["dev"]["pearson"] > 50
    assert done["MNLI"]["scores"].keys() == {"m", "mm"} and math.isfinite(done["MNLI"]["train_loss"])
    answers = {
        path.stem: path.read_text().splitlines() for path in (tmp_path / "out").glob("predictions/*epochs12*/*.tsv")
    }
    assert answers.keys() == {"SST-2", "STS-B", "MNLI-m", "MNLI-mm", "AX"}
    assert answers["MNLI-m"][0] == "index\tprediction" and answers["MNLI-m"][1].startswith("10\t")
    assert {line.split("\t")[1] for line in answers["AX"][1:]} <= set(TASKS["MNLI"].labels)
    assert [line.split("\t")[1] for line in answers["SST-2"][1:]] == ["1", "0", "1", "0", "1"]


def write_run(folder: Path) -> Path:
    """A run directory with an exported model."""
    write_encoder(folder / "export" / "stage-1-1L")
    (folder / "export" / "final").symlink_to("stage-1-1L")
    (folder / "metrics.jsonl").write_text("")
    return folder


def relink(folder: Path, target: Path | str) -> None:
    (folder / "export" / "final").unlink()
    (folder / "export" / "final").symlink_to(target)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no export": (lambda run: (run / "export").rename(run / "gone"), "has exported no model yet"),
    "a dangling link": (lambda run: relink(run, "nowhere"), "has exported no model yet"),
    "a link that leads out": (lambda run: relink(run, write_encoder(run.parent / "other")), "leads out of the run"),
    "a link in the model": (
        lambda run: ((run / "export/final/config.json").unlink(), (run / "export/final/config.json").symlink_to("/x")),
        "is a link to /x",
    ),
    "no weights": (lambda run: (run / "export/final/model.safetensors").unlink(), "model.safetensors"),
    "torn weights": (lambda run: os.truncate(run / "export/final/model.safetensors", 1000), "are damaged"),
    "a torn config": (lambda run: (run / "export/final/config.json").write_text("{"), "config.json is damaged"),
    "a null config": (lambda run: (run / "export/final/config.json").write_text("null"), "config.json is damaged"),
    "a deep config": (
        lambda run: (run / "export/final/config.json").write_text("[" * 100_000),
        "config.json is damaged",
    ),
    "a wrong width": (
        lambda run: (run / "export/final/config.json").write_text(
            (run / "export/final/config.json").read_text().replace('"hidden_size": 16', '"hidden_size": "x"')
        ),
        "hidden_size: input should be a valid integer",
    ),
    "a torn tokenizer": (lambda run: (run / "export/final/tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_one_sentence_and_the_mended_one_works(tmp_path: Path, what: str) -> None:
    run = write_run(tmp_path / "run")
    assert load_encoder(str(run), None, 32).source == str(run / "export" / "final")
    damage, message = DAMAGE[what]
    damage(run)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(str(run), None, 32)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["file", "a\nb", "x" * 10_000])
def test_a_model_that_is_no_folder_is_one_sentence(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match="--model .* is (a file|no folder)"):
        load_encoder(name, None, 32)


@pytest.fixture(scope="module")
def glue_run(tmp_path_factory: pytest.TempPathFactory) -> GlueRun:
    """The one job of a bag of words, and a result of it."""
    folder = tmp_path_factory.mktemp("glue")
    write_task(folder / "glue", "RTE")
    options = {"model": str(write_encoder(folder / "m")), "data": str(folder / "glue"), "tasks": "RTE", "seeds": 1}
    run = GlueRun(GlueConfig(**options, beside="bag_of_words", output_dir=str(folder / "out")))
    run.make_folder()
    for job in run.jobs():
        if job.arm == "bag_of_words":
            run.run_job(job)
    return run


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "null", "config.json is damaged"),
        ("config.json", "[" * 100_000, "config.json is damaged"),
        ("config.json", "{}", "that of another command"),
        ("config.json", '{"model": {"hidden_size": 8}, "stages": []}', "that of another command"),
        ("config.json", '{"model": "m", "max_length": 128}', "chose settings on the development set"),
        ("config.json", None, "has results and no config.json"),
        ("results/RTE-bag_of_words.json", "null", "delete it, and the same command does that training again"),
        ("results/RTE-bag_of_words.json", b"\xff", "delete it, and the same command does that training again"),
        ("results/RTE-bag_of_words.json", {"scores": {}}, "is not the result of that training"),
        ("results/RTE-bag_of_words.json", {"choosing": True}, "is not the result of that training"),
        ("results/RTE-bag_of_words.json", {"test_scores": {"RTE": {"accuracy": 1}}}, "is not the result of that"),
        ("results/RTE-bag_of_words.json", {"choice": {"task": 3}}, "choice.task: input should be a valid string"),
        ("results/RTE-bag_of_words.json", {"task": "CoLA"}, "is not the result of that training"),
        ("results/RTE-bag_of_words.json", {"scores": {"dev": {"accuracy": float("nan")}}}, "scores.dev.accuracy"),
        ("results/RTE-bag_of_words.json", {"failed": 7}, "failed: input should be a valid string"),
    ],
)
def test_damaged_results_are_named_before_anything_is_trained(
    glue_run: GlueRun, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    shutil.copytree(glue_run.folder, tmp_path / "out")
    run, path = copy.copy(glue_run), tmp_path / "out" / name
    run.folder = tmp_path / "out"
    run.check_results()
    whole = path.read_bytes()
    if isinstance(content, dict):
        content = json.dumps(json.loads(whole) | content)
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        run.check_results()
    path.write_bytes(whole)
    run.check_results()


@pytest.mark.parametrize(
    "name", ["config.json", "results", "results/RTE-bag_of_words.json", "results/.config.lock", "predictions"]
)
def test_links_in_the_output_folder_are_not_followed(glue_run: GlueRun, tmp_path: Path, name: str) -> None:
    shutil.copytree(glue_run.folder, tmp_path / "out")
    run, path = copy.copy(glue_run), tmp_path / "out" / name
    run.folder = tmp_path / "out"
    if path.exists():
        path.rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    outcome = Outcome(scores={}, predictions={"RTE": [0, 1, 0, 1, 0]}, train_loss=0.0)
    with pytest.raises(UserError, match="is a link"):
        run.make_folder()
        run.write_predictions(run.jobs()[0], outcome)


def test_a_folder_of_another_command_is_refused(glue_run: GlueRun, tmp_path: Path) -> None:
    run = copy.copy(glue_run)
    run.folder = tmp_path
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(UserError, match="holds comparison.json of another command"):
        run.check_results()
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]
