"""The DeepSpeed configuration: read, checked, and completed with what the recipe decides.

Batch sizes, clipping and precision live in the recipe; in the file they are "auto". A number there that disagrees is
an error, never a silent winner.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_stacking.config import UserError

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

KNOWN_KEYS = (
    *BATCH_KEYS,
    "gradient_clipping",
    "bf16",
    "zero_optimization",
    "data_types",
    "communication_data_type",
    "activation_checkpointing",
    "compile",
    "comms_logger",
    "flops_profiler",
    "disable_python_gc",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
)

REFUSED_KEYS = {
    "optimizer": "the recipe's `optimizer` sets it",
    "scheduler": "the recipe's `schedule` and stages set the learning rate",
    "fp16": "training runs in bf16 or fp32, set by --precision",
    "zero_allow_untested_optimizer": "every optimizer used here is tested",
    "gradient_predivide_factor": "the loss is already normalised over the global batch",
    "prescale_gradients": "the loss is already normalised over the global batch",
    "gradient_allreduce_op": "the loss is already normalised over the global batch",
}


def load_ds_config(path: str) -> dict[str, Any]:
    """Read and check a DeepSpeed configuration file.

    Raises UserError, one sentence, for a missing file, no JSON, unknown keys and keys that contradict each other.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"DeepSpeed configuration {path} cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed configuration {path} is no JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise UserError(f"DeepSpeed configuration {path} must be a JSON object.")
    for key in raw:
        _check_key(path, key)
    _check_zero(path, raw)
    bf16 = raw.get("bf16", {})
    if not isinstance(bf16, dict) or bf16.get("enabled", "auto") not in ("auto", True, False):
        raise UserError(f'{path}: bf16 must be an object with "enabled": "auto", true or false.')
    return raw


def _check_key(path: str, key: str) -> None:
    if key in REFUSED_KEYS:
        raise UserError(f"{path}: remove {key!r}, {REFUSED_KEYS[key]}.")
    if key not in KNOWN_KEYS:
        near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
        raise UserError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."))


def _check_zero(path: str, raw: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = raw.setdefault("zero_optimization", {"stage": 0})
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        near = difflib.get_close_matches(key, DeepSpeedZeroConfig.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near and first["type"] == "extra_forbidden" else "."
        raise UserError(f"{path}: zero_optimization.{key}: {first['msg']}{hint}") from None
    except TypeError:
        raise UserError(f"{path}: zero_optimization must be a JSON object.") from None
    stage = zero.get("stage", 0)
    if _offloads(zero, "offload_param") and stage != 3:
        raise UserError(f"{path}: offload_param needs ZeRO stage 3, but the stage is {stage}.")
    if _offloads(zero, "offload_optimizer") and stage == 0:
        raise UserError(f"{path}: offload_optimizer needs ZeRO stage 1, 2 or 3, but the stage is 0.")
    for key in ("offload_param", "offload_optimizer"):
        if zero.get(key, {}).get("device") == "nvme":
            raise UserError(f"{path}: {key} to nvme is not supported; use cpu.")


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"


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
                f"The DeepSpeed configuration sets {key} to {config[key]}, but the recipe makes it {value}; "
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
    config.setdefault("steps_per_print", 2**31)
    return config
