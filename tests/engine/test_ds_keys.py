"""The table of DeepSpeed's keys holds every key that the installed DeepSpeed reads, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config as ds
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

from ds_stacking.engine.ds_keys import KEYS, SECTIONS
from tests.engine.test_ds_growth import RUNS

GUIDE = Path(__file__).parents[2] / "docs" / "deepspeed.md"


class Recording(dict):
    """A configuration that remembers the keys that were looked up in it, whether they are there or not."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # DeepSpeed asks `key in config.keys()`
        return self

    def __copy__(self) -> Recording:
        return self


def read_by_deepspeed() -> set[str]:
    """Names of the keys that DeepSpeed looks up when it reads a configuration."""
    found: set[str] = set()
    sections = [name for name in SECTIONS if "." not in name and name not in ("zero_optimization", "bf16")]
    inner = {name: Recording() for name in sections if name != "comms_logger"}
    outer = Recording({"train_batch_size": 1, **inner})
    ds.DeepSpeedConfig(outer)
    found |= outer.read | {f"{name}.{key}" for name, content in inner.items() for key in content.read}
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    for section, model in models.items():
        found |= {f"{section}.{field}" for field in fields(model)}
    zero = {f"zero_optimization.{key}" for key in ds._REMOVED_ZERO_CONFIG_KEYS}
    return (found | zero | set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS)) - SECTIONS


def fields(model: type[BaseModel]) -> set[str]:
    """Keys of a section; those of the two offload sections with these before them."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        key = field.alias or name
        hints = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
        parts = [hint for hint in hints if isinstance(hint, type) and issubclass(hint, BaseModel)]
        names |= {f"{key}.{inner}" for inner in fields(parts[0])} if key.startswith("offload_") else {key}
    return names


ELSEWHERE = {"sequence_parallel_size", "data_parallel_size", "allgather_size"}
"""Keys that DeepSpeed reads in other places than its configuration class, or in a format that is refused whole."""


def test_every_key_of_the_installed_deepspeed_is_in_the_table() -> None:
    assert read_by_deepspeed() - KEYS.keys() == set(), "DeepSpeed knows keys that ds_keys.py does not"
    assert KEYS.keys() - read_by_deepspeed() - ELSEWHERE == set(), "ds_keys.py has keys that DeepSpeed does not know"


def test_no_constant_of_deepspeed_names_a_key_that_was_missed() -> None:
    """Names of keys in DeepSpeed's constants; what is not one is listed."""
    inside = {name.rpartition(".")[2] for name in KEYS} | {part for name in SECTIONS for part in name.split(".")}
    named = {
        value
        for name, value in vars(constants).items()
        if name.isupper() and isinstance(value, str) and re.fullmatch("[a-z][a-z_0-9]*", value)
    }
    others = {
        *("train", "eval", "predict", "encode", "params", "type", "legacy_fusion", "ddp_bf16", "mean", "sum"),
        *(
            "check_overflow",
            "fp32",
            "auto",
            "ds_pipe_replicated",
            "data_parallel_group",
            "global_rank",
            "max_grad_norm",
        ),
    }
    within_refused = {
        *("loss_scale", "auto_cast", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        *("consecutive_hysteresis", "fp16_master_weights_and_grads", "dtype", "lower_precision_safe_modules"),
        *("tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "pipeline_stage"),
    }
    assert named - inside - others - within_refused == set()


def test_every_key_that_works_is_trained_with_in_every_stage_that_it_is_for() -> None:
    trained = {
        (name, run.zero["stage"]) for run in RUNS.values() for name in names(run.config()) if not KEYS[name].refused
    }
    promised = {(key.name, stage) for key in KEYS.values() if not key.refused for stage in key.stages}
    recipe = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert {(name, stage) for name, stage in promised - trained if name not in {*recipe, "bf16.enabled"}} == set()


def names(config: dict[str, Any], before: str = "") -> set[str]:
    """Every key of a configuration with its sections before it."""
    found: set[str] = set()
    for name, value in config.items():
        found |= names(value, f"{before}{name}.") if before + name in SECTIONS else {before + name}
    return found


def rows() -> list[str]:
    """The guide's table: key, ZeRO stages in which it works or why it is refused, and what grow_engine does."""
    made = []
    for key in KEYS.values():
        stages = "all stages" if len(key.stages) == 4 else "ZeRO " + ", ".join(map(str, key.stages))
        ours = f"refused: {key.refused}" if key.refused else f"works, {stages}"
        theirs = ("refused" if key.refused else "must be " + key.values) if key.others else "passes"
        made.append(f"| `{key.name}` | {ours} | {theirs} |")
    return made


def test_the_guide_shows_the_table() -> None:
    """`python -m tests.engine.test_ds_keys` prints the rows."""
    assert [line for line in GUIDE.read_text().splitlines() if line.startswith("| `")] == rows()


@pytest.mark.parametrize("name", ["new_feature", "zero_optimization.new_feature"])
def test_a_new_key_of_deepspeed_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ds.get_steps_per_print
    if name == "new_feature":
        monkeypatch.setattr(ds, "get_steps_per_print", lambda config: (config.get(name), original(config))[1])
    else:
        monkeypatch.setitem(DeepSpeedZeroConfig.model_fields, "new_feature", DeepSpeedZeroConfig.model_fields["stage"])
    assert read_by_deepspeed() - KEYS.keys() == {name}


if __name__ == "__main__":
    print(*rows(), sep="\n")
