"""Options and recipes: what wins, what is refused and in which words, exit codes."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_stacking import command_line
from ds_stacking.command_line import RECIPES, field_types, parse_run, run_main
from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig
from ds_stacking.engine.ds_config import load_ds_config
from ds_stacking.training.batching import plan_batch
from ds_stacking.training.build import check_stages

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.json"))


def write(folder: Path, content: Any) -> str:
    """A recipe file; `content` is its text or a value to be written as JSON."""
    path = folder / "recipe.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refusal(*arguments: str) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(UserError) as error:
        parse_run(arguments)
    message = str(error.value)
    assert "\n" not in message and message[-1] in ".?", message
    return message


def recipe(name: str) -> dict[str, Any]:
    return json.loads((RECIPES / f"{name}.json").read_text())


def test_no_options_are_the_quickstart() -> None:
    assert parse_run([]) == RunConfig()


def test_quickstart_recipe_equals_the_defaults() -> None:
    config = parse_run(["--recipe", "quickstart"])
    assert config.description
    assert replace(config, description="") == RunConfig()


def decides_the_model(name: str) -> bool:
    """Whether an option belongs into a recipe; where and how a run is kept does not."""
    kept = (
        "output_dir",
        "overwrite",
        "shared",
        "resume",
        "branch_from",
        "max_skipped_steps",
        "hang_timeout",
        "kernels",
        "tiles",
        "compile",
        *("corpus.verify", "corpus.max_document", "corpus.max_expansion", "corpus.zstd_window"),
        *("corpus.follow_links", "corpus.max_leak", "corpus.fingerprint", "corpus.workers"),
    )
    return name not in kept and not name.startswith("checkpoint_")


@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_are_complete(name: str) -> None:
    """A recipe names every field that decides the model, so that a changed default never changes a recipe."""
    content = recipe(name)
    assert content["name"] == name
    assert content["description"]
    groups = [(key, value) for key, value in content.items() if isinstance(value, dict)]
    given = set(content) | {f"{key}.{inner}" for key, group in groups for inner in group}
    assert given == set(filter(decides_the_model, field_types(RunConfig)))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_divide_by_ranks_and_grow(name: str, world_size: int) -> None:
    config = parse_run(["--recipe", name])
    ds_config = load_ds_config(str(ROOT / config.deepspeed_config))
    plans = check_stages(config, ds_config, bf16=config.precision in ("bf16", "fp8"), world_size=world_size)
    for stage, plan in zip(config.stages, plans, strict=True):
        tokens = stage.tokens_per_step or config.tokens_per_step
        ours = plan.world_size * plan.accumulation * plan.micro_batch_size * config.corpus.sequence_length
        assert ours == tokens
        assert plan.micro_batch_size <= (stage.micro_batch_size or config.micro_batch_size)


def test_gong2019_has_the_published_numbers() -> None:
    """reproduce_bert.sh: --max-tokens x --update-freq x 4 GPUs, --lr, --end-lr, --warmup-updates, --max-update."""
    config = parse_run(["--recipe", "bert_base_gong2019"])
    stages = config.stages
    assert [(stage.layers, stage.steps) for stage in stages] == [(3, 50_000), (6, 70_000), (12, 280_000)]
    assert [stage.tokens_per_step for stage in stages] == [25_600 * 4, 14_336 * 2 * 4, 10_240 * 3 * 4]
    assert [(stage.lr, stage.lr_end) for stage in stages] == [(8e-4, 5.5e-4), (5.5e-4, 3e-4), (3e-4, 0.0)]
    assert [stage.warmup_steps for stage in stages] == [10_000, 0, 0]
    assert [stage.lr_steps for stage in stages] == [None, None, 800_000]
    plans = [plan_batch(config, stage, 4) for stage in stages]
    assert [plan.accumulation for plan in plans] == [1, 2, 3]
    assert (config.operator, config.optimizer_state, config.precision) == ("stack", "reset", "fp32")
    adam = config.optimizer
    assert (adam.betas, adam.eps, adam.weight_decay, adam.decay_all, adam.clip) == ((0.9, 0.999), 1e-6, 0.01, True, 0)
    assert not adam.eps_correction  # fairseq/optim/adam.py: denom = exp_avg_sq.sqrt().add_(group['eps'])
    assert config.model.next_sentence and config.model.norm == "pre"


@pytest.mark.parametrize("front", [True, False])
def test_options_override_the_recipe_wherever_they_stand(tmp_path: Path, front: bool) -> None:
    path = write(tmp_path, {"lr": 0.5, "seed": 7, "model": {"hidden_size": 64, "dropout": 0.0}})
    options = ["--lr", "0.25", "--model.hidden_size=32"]
    config = parse_run([*options, "--recipe", path] if front else [f"--recipe={path}", *options])
    assert (config.lr, config.seed, config.model.hidden_size, config.model.dropout) == (0.25, 7, 32, 0.0)


def test_feed_forward_width_follows_the_width_given(tmp_path: Path) -> None:
    assert parse_run(["--model.hidden_size", "64"]).model.intermediate_size == 256
    assert parse_run(["--recipe", write(tmp_path, {"model": {"hidden_size": 64}})]).model.intermediate_size == 256


def test_switches_need_no_value() -> None:
    config = parse_run(["--overwrite", "--model.next_sentence", "--corpus.lowercase", "false"])
    assert config.overwrite and config.model.next_sentence and not config.corpus.lowercase


def test_the_launchers_own_option_is_ignored() -> None:
    assert parse_run(["--local_rank=1", "--seed", "3"]).seed == 3


def test_stage_objects_on_the_command_line() -> None:
    (stage,) = parse_run(["--stages", '[{"layers": 2, "steps": 3, "lr": 1e-3}]']).stages
    assert (stage.layers, stage.steps, stage.lr) == (2, 3, 1e-3)


def test_printed_configuration_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lr", "0.25", "--stages", "2:3,4:5", "--model.hidden_size", "64"]
    with pytest.raises(SystemExit) as end:
        parse_run([*options, "--print_config"])
    assert end.value.code == 0
    assert parse_run(["--recipe", write(tmp_path, capsys.readouterr().out)]) == parse_run(options)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        parse_run(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    explained = re.findall(r"--([\w.]+) \S+ (?!--)", words)
    assert set(field_types(RunConfig)) <= set(explained)
    assert "--lr LR Peak learning rate. (default: 0.002)" in words
    assert "0 means four times hidden_size" in words and "such as 20231101.en. (default: null)" in words


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--lrr", "lr"),
        ("--hiden_size", "model.hidden_size"),
        ("--model.hiden_size", "model.hidden_size"),
        ("--corpus.seqence_length", "corpus.sequence_length"),
        ("--recip", "recipe"),
        ("--beta", "optimizer.betas"),
    ],
)
def test_unknown_options_name_the_nearest(option: str, near: str) -> None:
    assert refusal(option, "3") == refusal(f"{option}=3") == f"Unknown option {option!r}; did you mean --{near}?"


def test_nothing_near_is_not_guessed() -> None:
    assert refusal("--zzzzzz", "1") == "Unknown option '--zzzzzz'; --help lists all."
    assert refusal("extra") == "Argument 'extra' belongs to no option; options begin with --, and --help lists them."


def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path) -> None:
    said = {refusal("--eval_blocks=3"), refusal("--recipe", write(tmp_path, {"eval_blocks": 3}))}
    assert said == {"eval_blocks is now called eval_sequences."}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"schedul": "wsd"}, "Unknown recipe key 'schedul'; did you mean schedule?"),
        (
            {"model": {"hiden_size": 3}},
            "Unknown recipe key 'model.hiden_size'; did you mean model.hidden_size?",
        ),
        (
            {"stages": [{"layers": 2, "steps": 3}, {"layers": 4, "steps": 3, "warmup_step": 3}]},
            "Unknown recipe key 'stages[1].warmup_step'; did you mean stages[1].warmup_steps?",
        ),
        ({"stages": [{"layers": 2}]}, "stages[0].steps is missing; give it."),
        ({"stages": [{"layers": "two", "steps": 1}]}, "stages[0].layers is two; it must be a whole number."),
        ({"stages": [{"layers": 2, "steps": 1, "lr": "x"}]}, "stages[0].lr is x; it must be a finite number or null."),
        ({"stages": [{"layers": 2, "steps": None}]}, "stages[0].steps is null; it must be a whole number."),
        (
            {"stages": [{"layers": 2, "steps": 1, "rewarm_steps": None}]},
            "stages[0].rewarm_steps is null; it must be a whole number.",
        ),
        ({"stages": [{"layers": 2, "steps": "2"}]}, 'stages[0].steps is "2"; it must be a whole number.'),
        ({"stages": [7]}, "stages[0] is 7; it must be an object with layers and steps."),
        (
            {"stages": 5},
            "stages is 5; it must be a list of objects with layers and steps or text such as 2:450,4:450,8:400.",
        ),
        (
            {"stages": None},
            "stages is null; it must be a list of objects with layers and steps or text such as 2:450,4:450,8:400.",
        ),
        ({"lr": "fast"}, "lr is fast; it must be a finite number."),
        ({"lr": "x" * 500}, f"lr is {'x' * 80}...; it must be a finite number."),
        ({"lr": None}, "lr is null; it must be a finite number."),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number."),
        ({"overwrite": "maybe"}, "overwrite is maybe; it must be true or false."),
        ({"model": 7}, "model is 7; it must be an object of its fields."),
        ({"model": {"norm": "mid"}}, "model.norm is mid; it must be pre or post."),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas is [0.9]; it must be a list of 2 numbers."),
        ({"lr": 10**400}, f"lr is {'1' + '0' * 79}...; it must be a finite number."),
        ({"lr.x": 3}, "Unknown recipe key 'lr.x'; did you mean lr?"),
        ({"recipe": "x"}, "Unknown recipe key 'recipe'; --help lists all."),
    ],
)
def test_bad_recipes(tmp_path: Path, content: Any, sentence: str) -> None:
    assert refusal("--recipe", write(tmp_path, content)) == sentence


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{",
            "lr: 1",
            '{"lr": 1,}',
            '{"seed": 1, "seed": 1}',
            '{"model": {"norm": 1, "norm": 2}}',
        ),
        f'{{"seed": {"9" * 5000}}}',
    ],
)
def test_recipe_that_is_no_json(tmp_path: Path, content: str) -> None:
    said = refusal("--recipe", write(tmp_path, content))
    assert said.startswith(f"Recipe {tmp_path}/recipe.json")
    assert "it is no JSON (" in said or "stands there twice; keep one" in said


def test_recipe_that_is_binary_or_no_object(tmp_path: Path) -> None:
    assert "its content: input should be an object" in refusal("--recipe", write(tmp_path, "[1]"))
    (tmp_path / "recipe.json").write_bytes(b"\xff\xfe\x00")
    assert "it is no JSON" in refusal("--recipe", str(tmp_path / "recipe.json"))


@pytest.mark.parametrize("brackets", ["[]", ['{"a":', "}"]])
def test_recipe_that_is_nested_a_hundred_thousand_deep(tmp_path: Path, brackets: Any) -> None:
    path = write(tmp_path, brackets[0] * 100_000 + "1" + brackets[1] * 100_000)
    assert "recursion limit exceeded" in refusal("--recipe", path)


def test_recipe_that_is_no_recipe_by_its_size(tmp_path: Path) -> None:
    assert "has more than 1,048,576 bytes" in refusal("--recipe", write(tmp_path, " " * (1 << 20) + "{}"))


def test_missing_recipe(tmp_path: Path) -> None:
    assert refusal("--recipe", "quikstart").endswith("is no file and no shipped recipe; did you mean quickstart?")
    assert "choose from bert_base_gong2019, " in refusal("--recipe", str(tmp_path / "nothing.json"))
    assert "choose from bert_base_gong2019, " in refusal("--recipe", str(tmp_path))
    assert refusal("--recipe") == "--recipe expected one argument."
    assert refusal("--recipe", "quickstart", "--recipe=quickstart") == "--recipe is given 2 times; give one recipe."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr", "fast"], "lr is fast; it must be a finite number."),
        *(
            (["--lr", value], f"lr is {said}; it must be a finite number.")
            for value, said in (("inf", "inf"), ("nan", "nan"), ("1e999", "inf"), ("Infinity", "inf"))
        ),
        (["--name=" + "[" * 100_000], f"name has 100,000 characters ({'[' * 20!r}...); 4,000 are the most."),
        (["--lr=" + "[" * 100_000], f"lr is {'[' * 80}...; it must be a finite number."),
        (["--lr", "9" * 400], f"lr is {'9' * 80}...; it must be a finite number."),
        (["--precision="], "precision is ''; it must be auto or bf16 or fp8 or fp32."),
        (
            ["--corpus.vocab_size", "1000000000000"],
            "corpus.vocab_size is 1000000000000; it must lie between 100 and 4194304.",
        ),
        (
            ["--stages", '[{"layers": 1, "steps": 2, "lr": 1e999}]'],
            "stages[0].lr is inf; it must be a finite number or null.",
        ),
        (["--output_dir", ""], "output_dir is empty; give it a value, or leave it out for its default."),
        (["--lr", "null"], "lr is null; it must be a finite number."),
        (["--lr"], "--lr expected one argument."),
        (["--stages"], "--stages expected one argument."),
        (["--precision", "fp16"], "precision is fp16; it must be auto or bf16 or fp8 or fp32."),
        (
            ["--precision", "fp8", "--model.hidden_size", "768", "--model.num_heads", "12"],
            "precision fp8 does not pay with model.hidden_size 768: it needs 1,024 or more; use bf16.",
        ),
        (
            ["--precision=fp8", "--model.hidden_size=1032", "--model.num_heads=12"],
            "precision fp8 multiplies by 16 columns at a time, and model.hidden_size is 1032; give it a multiple "
            "of 16, or use bf16.",
        ),
        (
            [
                *("--precision=fp8", "--model.hidden_size=1024"),
                "--model.num_heads=16",
                "--model.intermediate_size=4090",
            ],
            "precision fp8 multiplies by 16 columns at a time, and model.intermediate_size is 4090; give it a "
            "multiple of 16, or use bf16.",
        ),
        (["--model", "x"], "model is x; it must be an object of its fields."),
        (["--stages", "3x4"], "Stage '3x4' of '3x4' is not LAYERS:STEPS; write for example 3:50000,6:70000."),
    ],
)
def test_bad_values(arguments: list[str], sentence: str) -> None:
    assert refusal(*arguments) == sentence


def test_growth_that_cannot_be_is_refused() -> None:
    ds_config = load_ds_config(str(ROOT / "ds_configs/zero2.json"))
    for stages, part in (("3:5,8:5", "8 is not a multiple of 3"), ("4:5,2:5", "would shrink the model")):
        with pytest.raises(UserError, match=part):
            check_stages(parse_run(["--stages", stages]), ds_config, bf16=False, world_size=1)


def raises(error: BaseException | None) -> int:
    def body() -> None:
        if error is not None:
            raise error

    return run_main(body)


def test_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "WAIT_FOR_RANK_0", 0.0)
    assert raises(None) == 0
    assert raises(RuntimeError("broken\nand more")) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: RuntimeError: broken; the full traceback is in (\S+)\n", said)
    assert raises(UserError("This is wrong; mend it.")) == 2
    assert capsys.readouterr().err == "error: This is wrong; mend it.\n"


@pytest.mark.parametrize("shown", [False, True])
def test_tracebacks_are_shown_where_they_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *(["--traceback"] if shown else []), "--lr", "1"])

    def body() -> None:
        assert sys.argv[1:] == ["--lr", "1"]
        raise OSError(28, "No space left on device", "/a/b")

    assert run_main(body) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: /a/b: No space left on device; make room")
    assert ("Traceback (most recent call last)" in said) == shown == ("in body" in said)


def test_an_interruption_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert raises(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: interrupted; the same command starts again.\n"


def test_the_environment_is_looked_at_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "abc")
    assert raises(RuntimeError("never")) == 2
    assert capsys.readouterr().err.startswith("error: The environment variable RANK is 'abc'")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launchers").glob("*.py")))
def test_every_launcher_tells_of_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(ROOT / "launchers" / f"{name}.py"), run_name="__main__")
    assert "--traceback prints the full traceback" in capsys.readouterr().out


def test_a_sentence_is_one_line_however_long_a_name_is(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("a\nb\x1b[2J" + "x" * 5000)

    assert run_main(main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a b [2Jxxx") and line.endswith("...") and len(line) < 1300
