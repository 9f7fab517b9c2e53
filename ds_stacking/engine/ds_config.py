"""The DeepSpeed configuration: read, checked, and completed with what the recipe decides.

Batch sizes, clipping and precision live in the recipe; in the file they are "auto". A number there that disagrees is
an error, never a silent winner.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import read_settings
from ds_stacking.common.words import nearest, shown
from ds_stacking.engine.ds_keys import KEYS, SECTIONS


def load_ds_config(path: str) -> dict[str, Any]:
    """Read and check a DeepSpeed configuration file.

    Raises UserError, one sentence, for a missing file, no JSON, keys that are unknown, refused or there twice, values
    that DeepSpeed would refuse later, and keys that contradict each other.
    """
    raw = read_settings(Path(path), where=f"DeepSpeed configuration {path}")
    for name, value in raw.items():
        _check_key(path, name, value)
    raw.setdefault("zero_optimization", {}).setdefault("stage", 0)
    _check_types(path, raw)
    _check_offload(raw["zero_optimization"], path)
    return raw


def _check_key(path: str, name: str, value: Any) -> None:
    """Raise UserError where the table refuses a key, or one inside it; `name` has its sections before it."""
    if name in SECTIONS:
        if value is None and name.startswith("zero_optimization.offload_"):
            return  # DeepSpeed's own default
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} must be a JSON object.")
        for inner, content in value.items():
            _check_key(path, f"{name}.{inner}", content)
    elif name not in KEYS:
        section = name.rpartition(".")[0]
        known = {key.removeprefix(section).strip(".").split(".")[0] for key in KEYS if key.startswith(section)}
        near = nearest(name.rpartition(".")[2], sorted(known), otherwise="remove it.")
        raise UserError(f"{path}: unknown key {shown(name)}; {near}")
    elif KEYS[name].refused:
        raise UserError(f"{path}: remove {name!r}, {KEYS[name].refused}.")
    elif not KEYS[name].check(value):
        raise UserError(f"{path}: {name} is {shown(value)}; it must be {KEYS[name].values}.")


def _check_types(path: str, raw: Mapping[str, Any]) -> None:
    """Raise UserError where DeepSpeed would refuse a value, which it does only when it builds an engine."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    _check_section(path, "zero_optimization", raw["zero_optimization"], DeepSpeedZeroConfig)
    _check_section(path, "comms_logger", raw.get("comms_logger", {}), CommsLoggerConfig)
    timer = raw.get("timers", {}).get("throughput", {})
    _check_section(path, "timers.throughput", timer, DeepSpeedThroughputTimerConfig)


def _check_section(path: str, name: str, content: dict[str, Any], model: type[BaseModel]) -> None:
    try:
        model(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise UserError(f"{path}: {where} is {shown(first['input'])}: {first['msg']}.") from None


def _check_offload(zero: dict[str, Any], path: str) -> None:
    """Raise UserError where the section `zero_optimization` offloads what its ZeRO stage cannot."""
    stage = zero["stage"]
    if _offloads(zero, "offload_param") and stage != 3:
        raise UserError(f"{path}: offload_param needs ZeRO stage 3, but the stage is {stage}.")
    if _offloads(zero, "offload_optimizer") and stage == 0:
        raise UserError(f"{path}: offload_optimizer needs ZeRO stage 1, 2 or 3, but the stage is 0.")


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lives in host memory."""
    return _offloads(config["zero_optimization"], "offload_optimizer")


def resolve_ds_config(
    raw: dict[str, Any],
    *,
    zero_stage: int | None,
    bf16: bool,
    clip: float,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
) -> dict[str, Any]:
    """Complete `raw` for one engine. Raises UserError where it names a number that disagrees with the recipe's."""
    config = copy.deepcopy(raw)
    decided = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "gradient_clipping": clip,
    }
    for key, value in decided.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"The DeepSpeed configuration sets {key} to {shown(config[key])}, but the recipe makes it {value}; "
                f'write "auto" there and change the recipe.'
            )
        config[key] = value
    section = config.setdefault("bf16", {})
    if section.get("enabled", "auto") not in ("auto", bf16):
        raise UserError(
            f"The DeepSpeed configuration sets bf16.enabled to {section['enabled']}, but the precision is "
            f'{"bf16" if bf16 else "fp32"}; write "auto" there and use --precision.'
        )
    section["enabled"] = bf16
    if zero_stage is not None:
        config["zero_optimization"]["stage"] = zero_stage
        _check_offload(config["zero_optimization"], f"zero_stage {zero_stage} of a stage")
    _set_gradient_sums(config, bf16=bf16, accumulation=accumulation)
    config.setdefault("steps_per_print", 2**31)
    # DeepSpeed's own clock waits for the device twice in every step, and what it finds is printed nowhere
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    _check_whole(config)
    return config


def _check_whole(config: dict[str, Any]) -> None:
    """Raise UserError where DeepSpeed's own reader refuses the configuration, which it would only with an engine."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # it multiplies by the ranks of the process group, of which there may be none yet
    alone = {name: value for name, value in config.items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(copy.deepcopy(alone))
    except Exception as error:  # an assertion, or any of pydantic's
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"DeepSpeed refuses the configuration ({words}); mend --deepspeed_config.") from None


def _set_gradient_sums(config: dict[str, Any], *, bf16: bool, accumulation: int) -> None:
    """Say in which type the gradients of a step's micro-batches are summed: fp32, unless the file says bf16.

    DeepSpeed 0.19.8 sums in fp32 as ZeRO stage 3 only: stage 0 refuses, stage 1 takes an optimizer that does not skip
    a NaN, and stage 2 sums in bf16 all the same where gradients cross ranks once per step. There stepping.py sums.
    """
    asked = config.pop("data_types", {}).get("grad_accum_dtype", "auto")
    if asked == "bf16" and not bf16:
        raise UserError(
            "The DeepSpeed configuration sums gradients in bf16, but the precision is fp32; use --precision."
        )
    if asked == "bf16":
        config["data_types"] = {"grad_accum_dtype": "bf16"}
    elif bf16 and accumulation > 1 and config["zero_optimization"]["stage"] == 3:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
