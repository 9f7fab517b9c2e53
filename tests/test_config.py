"""Checks of the run configuration: every refusal is one sentence that names the field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.config import (
    OPTIMIZER_STATES,
    QUICKSTART_STAGES,
    CorpusConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    parse_stages,
)
from ds_stacking.data.preparation.configuration import PreparationConfig
from ds_stacking.growth.policies import parse_policy

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, {"hidden_size": 130, "num_heads": 4}, "hidden_size 130 is not divisible by model.num_heads 4"),
    (ModelConfig, {"hidden_size": 0}, "model.hidden_size is 0"),
    (ModelConfig, {"num_heads": -2}, "model.num_heads is -2"),
    (ModelConfig, {"intermediate_size": -1}, "model.intermediate_size is -1"),
    (ModelConfig, {"max_positions": 0}, "model.max_positions is 0"),
    (ModelConfig, {"vocab_size": -1}, "model.vocab_size is -1"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout is 1.0"),
    (ModelConfig, {"attention_dropout": -0.1}, "model.attention_dropout is -0.1"),
    (ModelConfig, {"layer_norm_eps": 0.0}, "model.layer_norm_eps is 0.0"),
    (ModelConfig, {"initializer_range": 0.0}, "model.initializer_range is 0.0"),
    (CorpusConfig, {"sequence_length": 7}, "corpus.sequence_length is 7"),
    (CorpusConfig, {"masking_rate": 1.0}, "corpus.masking_rate is 1.0"),
    (CorpusConfig, {"eval_percent": 0.0}, "corpus.eval_percent is 0.0"),
    (CorpusConfig, {"vocab_size": 10}, "corpus.vocab_size is 10"),
    (CorpusConfig, {"max_documents": -1}, "corpus.max_documents is -1"),
    (PreparationConfig, {"near_duplicates": 1.5}, "near_duplicates is 1.5"),
    (PreparationConfig, {"max_leak": -1.0}, "max_leak is -1.0"),
    (PreparationConfig, {"shard_tokens": 2**31}, "shard_tokens is 2147483648"),
    (OptimizerConfig, {"betas": (0.9, 1.0)}, "optimizer.betas holds 1.0"),
    (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
    (OptimizerConfig, {"clip": -1.0}, "optimizer.clip is -1.0"),
    (OptimizerConfig, {"eps": 0.0}, "optimizer.eps is 0.0"),
    (StageConfig, {"layers": 0, "steps": 5}, "Stage 0:5 has no layers"),
    (StageConfig, {"layers": 2, "steps": 5, "lr_end": 0.1}, "without lr"),
    (StageConfig, {"layers": 2, "steps": 5, "lr": -0.1}, "lr is -0.1"),
    (StageConfig, {"layers": 2, "steps": 5, "lr": 0.1, "warmup_steps": -1}, "warmup_steps is -1"),
    (StageConfig, {"layers": 2, "steps": 5, "lr": 0.1, "warmup_steps": 6}, "more than the 5 steps"),
    (StageConfig, {"layers": 2, "steps": 5, "lr": 0.1, "lr_steps": 3, "warmup_steps": 4}, "more than the 3 steps"),
    (StageConfig, {"layers": 2, "steps": 5, "tokens_per_step": 0}, "tokens_per_step is 0"),
    (StageConfig, {"layers": 2, "steps": 5, "micro_batch_size": -1}, "micro_batch_size is -1"),
    (StageConfig, {"layers": 2, "steps": 5, "zero_stage": 4}, "zero_stage is 4"),
    (StageConfig, {"layers": 2, "steps": 5, "sequence_length": 4}, "sequence_length is 4"),
    (RunConfig, {"stages": [StageConfig(layers=2, steps=5, sequence_length=1024)]}, "has sequences of 1024"),
    (RunConfig, {"stages": []}, "stages is empty"),
    (RunConfig, {"stages": [StageConfig(layers=2, steps=5, rewarm_steps=3)]}, "no growth leads into it"),
    (
        RunConfig,
        {"stages": [StageConfig(layers=2, steps=5, tokens_per_step=100)]},
        "tokens_per_step 100 is no multiple",
    ),
    (RunConfig, {"tokens_per_step": 2047}, "tokens_per_step 2047 is no multiple"),
    (RunConfig, {"micro_batch_size": 0}, "micro_batch_size is 0"),
    (
        RunConfig,
        {"corpus": CorpusConfig(separate_documents=True), "model": ModelConfig(next_sentence=True)},
        "corpus.separate_documents hides",
    ),
    (RunConfig, {"eval_sequences": 0}, "eval_sequences is 0"),
    (RunConfig, {"log_every": 0}, "log_every is 0"),
    (RunConfig, {"lr": -1.0}, "lr is -1.0"),
    (RunConfig, {"seed": -1}, "seed is -1"),
    (RunConfig, {"seed": 2**32}, "seed is 4294967296; it must be 4,294,967,295 or less"),
    (RunConfig, {"seed": 10**5000}, "seed is a number of more than 40 digits"),
    (RunConfig, {"tokens_per_step": 10**13}, "tokens_per_step is 10000000000000; it must be 1,000,000,000,000 or"),
    (RunConfig, {"lr": float("inf")}, "lr is inf; it must be a finite number"),
    (RunConfig, {"lr": float("nan")}, "lr is nan; it must be a finite number"),
    (CorpusConfig, {"vocab_size": 10**12}, "corpus.vocab_size is 1000000000000; it must lie between 100 and"),
    (RunConfig, {"stages": "1:99999999999999999999"}, "Stage 1:99999999999999999999: steps is 99999999999999999999"),
    (RunConfig, {"stages": "1:2,1000000000:2"}, "layers is 1000000000; it must be 10,000 or less"),
    (RunConfig, {"stages": "1:" + "9" * 5000}, "stages has 5,002 characters"),
    (RunConfig, {"output_dir": ""}, "output_dir is empty"),
    (RunConfig, {"resume": ""}, "resume is empty"),
    (RunConfig, {"output_dir": "a\0b"}, "output_dir holds a NUL character"),
    (RunConfig, {"output_dir": "a" * 5000}, "output_dir has 5,000 characters"),
    (RunConfig, {"data": "caf\udce9"}, "data is 'caf\\udce9', which is no text in UTF-8"),
    (ModelConfig, {"hidden_size": 10**7}, "model.hidden_size is 10000000; it must be 1,000,000 or less"),
    (ModelConfig, {"initializer_range": float("inf")}, "model.initializer_range is inf"),
    (OptimizerConfig, {"betas": (0.9, float("nan"))}, "optimizer.betas is nan"),
    (StageConfig, {"layers": 2, "steps": 5, "lr": float("inf")}, "lr is inf; it must be a finite number"),
    (RunConfig, {"decay_percent": 101.0}, "decay_percent is 101.0"),
    (RunConfig, {"name": "../elsewhere"}, "name is '../elsewhere'"),
    (RunConfig, {"name": ""}, "name is ''"),
    (RunConfig, {"optimizer_state": "keep"}, "optimizer_state 'keep' is unknown"),
    (RunConfig, {"corpus": CorpusConfig(sequence_length=1024)}, "is longer than model.max_positions 512"),
]


@pytest.mark.parametrize(("config", "fields", "part"), REFUSED, ids=[part for _, _, part in REFUSED])
def test_bad_values_are_refused_in_one_sentence(config: type, fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        config(**({"data": "a", "output_dir": "b"} if config is PreparationConfig else {}), **fields)
    message = str(error.value)
    assert part in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("text", ["", "3", "3x4", "3:4,", "3:4;6:5", "3:-4", "a:b", "3:4.5"])
def test_stages_that_do_not_parse(text: str) -> None:
    with pytest.raises(UserError, match="is not LAYERS:STEPS; write for example"):
        parse_stages(text)


def test_stages_are_read() -> None:
    stages = parse_stages(" 3:50000, 6:70000,12:280000")
    assert [(stage.layers, stage.steps) for stage in stages] == [(3, 50000), (6, 70000), (12, 280000)]


def test_the_suggested_batch_is_accepted() -> None:
    with pytest.raises(UserError, match=r"; the nearest are 1984 and 2048\."):
        RunConfig(tokens_per_step=2047)
    for near in (1984, 2048):
        RunConfig(tokens_per_step=near)


def test_feed_forward_width_follows_the_hidden_size() -> None:
    assert ModelConfig(hidden_size=768, num_heads=12).intermediate_size == 3072
    assert ModelConfig(hidden_size=768, num_heads=12, intermediate_size=1000).intermediate_size == 1000


@pytest.mark.parametrize("name", [*OPTIMIZER_STATES, "scale:0.5"])
def test_every_optimizer_state_has_a_policy(name: str) -> None:
    assert RunConfig(optimizer_state=name).optimizer_state == name
    parse_policy(name)


def test_run_directory_follows_name_and_option() -> None:
    assert RunConfig(name="a").run_dir == "runs/a"
    assert RunConfig(name="a", output_dir="b").run_dir == "b"


def test_to_dict_is_json_and_holds_every_field() -> None:
    config = RunConfig().to_dict()
    assert config == json.loads(json.dumps(config))
    assert set(config) == {field.name for field in dataclasses.fields(RunConfig)}
    assert config["stages"][0]["layers"] == 2


@pytest.mark.parametrize("config", [RunConfig(), StageConfig(layers=2, steps=5), ModelConfig(), OptimizerConfig()])
def test_a_configuration_never_changes(config: Any) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


def test_stages_are_a_list_however_they_are_given() -> None:
    stages = [StageConfig(layers=2, steps=5), StageConfig(layers=4, steps=6)]
    assert RunConfig(stages="2:5,4:6").stages == RunConfig(stages=stages).stages == stages  # type: ignore[arg-type]
    assert RunConfig().stages == parse_stages(QUICKSTART_STAGES)


def documented_fields(config: type) -> dict[str, str]:
    """The docstring under each field of a configuration class, on one line."""
    texts = {}
    for part in filter(dataclasses.is_dataclass, config.__mro__):
        (body,) = (node.body for node in ast.parse(inspect.getsource(part)).body if isinstance(node, ast.ClassDef))
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[ast.unparse(node.target)] = " ".join(str(ast.literal_eval(after.value)).split())
    return texts


def table(config: type, prefix: str = "") -> str:
    """The rows of docs/configuration.md for a configuration class."""
    texts = documented_fields(config)
    rows = []
    for field in dataclasses.fields(config):
        value = QUICKSTART_STAGES if field.name == "stages" else field.default
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            continue
        default = "required" if value is dataclasses.MISSING else f"`{json.dumps(value)}`"
        rows.append(f"| `{prefix}{field.name}` | {default} | {texts[field.name]} |")
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (RunConfig, ""),
        (StageConfig, ""),
        (ModelConfig, "model."),
        (CorpusConfig, "corpus."),
        (OptimizerConfig, "optimizer."),
        (PreparationConfig, ""),
    ],
)
def test_the_documentation_lists_every_option(config: type, prefix: str) -> None:
    rows = table(config, prefix)
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    assert rows in text, f"docs/configuration.md is stale; the table of {config.__name__} is now\n\n{rows}"
