"""Going on with other settings: what may change does, and is told; what would make another run is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import UserError
from ds_stacking.config import RENAMED, RunConfig, StageConfig
from ds_stacking.training.changes import (
    CHANGEABLE,
    PLACES,
    describe,
    find_changes,
    read_config,
    refuse_another_finished_run,
    refuse_another_run,
    saved_settings,
    settings,
)
from ds_stacking.training.health import Unhealthy
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks
from tests.training.test_resume import assert_same_state, metrics, run

BASE = RunConfig(stages=[StageConfig(layers=layers, steps=10) for layers in (1, 2, 4)])
OTHER = replace(BASE, seed=99)


def changed(**fields: Any) -> dict[str, Any]:
    return find_changes(settings(BASE), settings(replace(BASE, **fields)))


def stage(number: int, **fields: Any) -> dict[str, Any]:
    return {"stages": [replace(s, **fields) if i == number else s for i, s in enumerate(BASE.stages)]}


def test_every_setting_is_known_by_name() -> None:
    assert set(CHANGEABLE) <= set(settings(BASE))
    assert {"seed", "corpus.sequence_length", "optimizer.betas", "stages[2].layers"} <= set(settings(BASE))
    assert not any(name.startswith("model.") or name in ("output_dir", "resume") for name in settings(BASE))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"lr": 1e-3}, "lr 0.002 -> 0.001"),
        ({"optimizer": replace(BASE.optimizer, clip=0.5)}, "optimizer.clip 1.0 -> 0.5"),
        ({"skip_above_sigma": 6.0, "eval_every": 7}, "eval_every 100 -> 7, skip_above_sigma 0.0 -> 6.0"),
        ({"schedule": "linear", "tracking": "none"}, 'schedule "wsd" -> "linear", tracking "wandb" -> "none"'),
        ({"hang_timeout": 60.0, "checkpoint_every": 9}, "checkpoint_every 500 -> 9, hang_timeout 1800.0 -> 60.0"),
        (stage(1, lr=0.01), "stages[1].lr null -> 0.01"),
        (stage(2, steps=99, zero_stage=3), "stages[2].steps 10 -> 99, stages[2].zero_stage null -> 3"),
        (stage(0, zero_stage=1), "stages[0].zero_stage null -> 1"),
        ({"output_dir": "elsewhere", "name": "other"}, ""),
    ],
)
def test_what_may_change_in_the_second_stage(fields: dict[str, Any], told: str) -> None:
    refuse_another_run(Path("step-12"), changed(**fields), stage=1)
    assert describe(changed(**fields)) == told


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"seed": 2, "lr": 1e-3}, ["seed is 1 there and 2 here"]),
        (
            {"operator": "last", "tokens_per_step": 4096},
            ["operator is ", "tokens_per_step is 2048 there"],
        ),
        ({"corpus": replace(BASE.corpus, masking_rate=0.4)}, ["corpus.masking_rate is 0.15 there and 0.4 here"]),
        ({"optimizer": replace(BASE.optimizer, weight_decay=0.3)}, ["optimizer.weight_decay"]),
        (stage(0, steps=12), ["stages[0].steps is 10 there and 12 here"]),
        (stage(0, lr=0.1), ["stages[0].lr is null there and 0.1 here"]),
        (stage(2, layers=8), ["stages[2].layers is 4 there and 8 here"]),
        ({"stages": BASE.stages[:2]}, ["stages[2].layers is 4 there and null here"]),
    ],
)
def test_what_would_be_another_run_is_refused_with_every_name(fields: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(UserError, match=r"^step-12 is of another run: .*--branch_from begins a new run") as error:
        refuse_another_run(Path("step-12"), changed(**fields), stage=1)
    assert all(name in str(error.value) for name in names) and "lr is 0.002" not in str(error.value)


def test_a_setting_that_the_checkpoint_does_not_know_was_the_default() -> None:
    then = settings(BASE)
    del then["corpus.masking"], then["stages[1].rewarm_steps"]
    assert find_changes(then, settings(BASE)) == {}
    other = replace(BASE, corpus=replace(BASE.corpus, masking="span"))
    assert list(find_changes(then, settings(other))) == ["corpus.masking"]


EARLIER = json.loads(Path(__file__).with_name("earlier_run.json").read_text())
"""What version 009532d saved of a shipped recipe: its config.json, a checkpoint's settings, and the digest that was
saved before there were settings."""


@pytest.mark.parametrize("identity", [{"settings": EARLIER["settings"]}, {"recipe": EARLIER["recipe"]}])
def test_a_shipped_recipe_goes_on_with_its_checkpoints_of_an_earlier_version(
    tmp_path: Path, identity: dict[str, Any]
) -> None:
    """They hold eval_blocks, and nothing of corpus.sentences, corpus.near_duplicates and corpus.workers."""
    now = parse_run(["--recipe=bert_base_gong2019", f"--output_dir={tmp_path}"])
    assert now.corpus.near_duplicates and now.corpus.sentences
    (tmp_path / "config.json").write_text(json.dumps(EARLIER["config"]))
    for config in (now, replace(now, eval_sequences=512, lr=1.0)):
        found = saved_settings(identity, tmp_path, config)
        assert found is not None and not (found.keys() & {*RENAMED, *PLACES})
        assert describe(find_changes(found, settings(now))) == ""
    with pytest.raises(UserError, match="is of another run: eval_sequences is 4096 there and 512 here; "):
        refuse_another_run(Path("step-12"), find_changes(found, settings(config)))
    assert saved_settings({"recipe": "0" * 64}, tmp_path, now) is None, "another one's"
    refuse_another_finished_run(now)
    with pytest.raises(UserError, match=r"\(eval_sequences 4096 -> 512\); choose"):
        refuse_another_finished_run(config)
    with pytest.raises(UserError, match=r"\(model.norm \"pre\" -> \"post\"\); choose"):
        refuse_another_finished_run(replace(now, model=replace(now.model, norm="post")))
    with pytest.raises(UserError, match=r"\(stages\[2\].lr 0.0003 -> 0.1\); choose"):
        refuse_another_finished_run(replace(now, stages=[*now.stages[:2], replace(now.stages[2], lr=0.1)]))


def test_the_digest_of_the_defaults_is_what_it_was(tmp_path: Path) -> None:
    digest = "b89c7289c5f20b5106bcc05f02711c92a7144be3ec18415b32de9a783c774b87"
    assert saved_settings({"recipe": digest}, tmp_path, RunConfig()) == settings(RunConfig())
    assert saved_settings({"recipe": digest}, tmp_path, BASE) is None


def test_long_values_are_told_apart() -> None:
    told = describe({"tokenizer": ("/data/" * 20 + "a", "/data/" * 20 + "b")})
    assert '/a" -> ...' in told and told.endswith('/b"') and len(told) < 100
    assert describe({"stages[0].\n\x1b[31m": (1, "\x1b")}) == 'stages[0].  [31m 1 -> "\\u001b"'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"lr": ', "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "its content"),
        ('{"model": 3}', "model: "),
        ('{"model": {}, "corpus": {}, "optimizer": {}, "stages": "1:2"}', "stages: "),
        ('{"model": {}, "corpus": {}, "optimizer": {}, "stages": [{"layers": "x", "steps": 1}]}', "stages.0.layers: "),
    ],
)
def test_a_damaged_configuration_is_a_sentence(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    for read in (
        lambda: read_config(tmp_path),
        lambda: refuse_another_finished_run(replace(BASE, output_dir=str(tmp_path))),
        lambda: saved_settings({"recipe": "x"}, tmp_path, BASE),
    ):
        with pytest.raises(UserError, match=f"config.json is damaged .*{said}.*; restore it, or start again"):
            read()


def test_a_configuration_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="config.json is a link to"):
        read_config(tmp_path)


@pytest.mark.parametrize("made_up", [[], 3, "x", {"stages[x].lr": 1}, {"stages[": 1}, {"a\nb": 1}, {"x" * 500: 1}])
def test_made_up_settings_of_a_checkpoint(tmp_path: Path, made_up: Any) -> None:
    with pytest.raises(UserError, match="give another checkpoint"):
        saved_settings({"settings": made_up}, tmp_path, BASE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes")
    write_corpus(folder / "corpus")
    return folder


def stages(lr: float) -> str:
    return "--stages=" + json.dumps([{"layers": 1, "steps": 8, "lr": 2e-3}, {"layers": 2, "steps": 10, "lr": lr}])


def post_mortem(folder: str) -> tuple[str, list[str]]:
    """A second stage at a rate far too high; what the run said at its end, and what the next start said."""
    from ds_stacking.training.progress import Console
    from ds_stacking.training.run import pretrain

    said: list[str] = []
    console = Console()
    console.log = said.append  # type: ignore[method-assign]
    options = [*small_options(Path(folder)), f"--output_dir={folder}/run", "--tracking=none", "--checkpoint_every=4"]
    options += ["--max_skipped_steps=2", "--eval_after_growth=0", "--resume=auto"]
    with pytest.raises(Unhealthy) as ended:
        pretrain(parse_run([*options, stages(lr=1e30)]), console=console)
    said.clear()
    pretrain(parse_run([*options, stages(lr=2e-3), "--log_every=2"]), console=console)
    return str(ended.value), said


@pytest.mark.distributed
def test_the_advice_of_a_post_mortem_can_be_followed(folder: Path) -> None:
    """And the run then ends as one whose rate was never too high, to the bit."""
    ended, said = run_ranks(1, post_mortem, str(folder))[0]
    assert "lower lr" in ended and "go on with --resume auto" in ended
    line = "changed at step 8: log_every 1 -> 2, stages[1].lr 1e+30 -> 0.002"
    assert said.count(line) == 1
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["stages"][1]["lr"] == 2e-3
    assert {"step": 8, "field": "stages[1].lr", "from": 1e30, "to": 2e-3} in config["changes"]
    run_ranks(1, run, str(folder), "healthy", 2, (), (stages(lr=2e-3), "--eval_after_growth=0"))
    assert_same_state(folder / "run", folder / "healthy")


@pytest.mark.distributed
def test_a_stage_under_way_goes_on_with_another_rate_and_other_steps(folder: Path) -> None:
    longer = ("--lr=0.001", "--stages=1:8,2:12,4:4", "--schedule=constant")
    run_ranks(1, run, str(folder), "longer", 2, (11,), (), False)
    run_ranks(1, run, str(folder), "longer", 2, (15,), longer, False)
    run_ranks(1, run, str(folder), "longer", 2, (), longer)
    rates = {record["step"]: record["lr"] for record in metrics(folder / "longer") if record["kind"] == "train"}
    assert rates[10] == 2e-3 and rates[12] == rates[24] == 1e-3
    assert [record["step"] for record in metrics(folder / "longer") if record["kind"] == "growth"] == [8, 20]
    changes = json.loads((folder / "longer" / "config.json").read_text())["changes"]
    assert [(change["step"], change["field"]) for change in changes] == [
        (11, "lr"),
        (11, "schedule"),
        (11, "stages[1].steps"),
        (11, "stages[2].steps"),
    ], "the last resumption changed nothing, and the change is remembered"
