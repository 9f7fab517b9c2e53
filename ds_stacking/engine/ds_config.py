"""The DeepSpeed configuration: read, checked, and completed with what the recipe decides.

Batch sizes, clipping and precision live in the recipe; in the file they are "auto". A number there that disagrees is
an error, never a silent winner.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

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

REFUSED_BF16_KEYS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""They drop the fp32 masters and moments, from which a growth is made."""


def load_ds_config(path: str) -> dict[str, Any]:
    """Read and check a DeepSpeed configuration file.

    Raises UserError, one sentence, for a missing file, no JSON, unknown keys and keys that contradict each other.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"DeepSpeed configuration {path} cannot be read ({error.strerror}); give --deepspeed_config."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed configuration {path} is no JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise UserError(f"DeepSpeed configuration {path} must be a JSON object.")
    for key in raw:
        _check_key(path, key)
    _check_zero(path, raw)
    _check_bf16(path, raw.get("bf16", {}))
    return raw


def _check_key(path: str, key: str) -> None:
    if key in REFUSED_KEYS:
        raise UserError(f"{path}: remove {key!r}, {REFUSED_KEYS[key]}.")
    if key not in KNOWN_KEYS:
        raise UserError(f"{path}: unknown key {key!r}{_nearest(key, KNOWN_KEYS)}")


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "; remove it."


def _check_bf16(path: str, bf16: Any) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    if not isinstance(bf16, dict) or not (bf16.get("enabled", "auto") == "auto" or isinstance(bf16["enabled"], bool)):
        raise UserError(f'{path}: bf16 must be an object with "enabled": "auto", true or false.')
    _check_section(path, "bf16", {**bf16, "enabled": True}, DeepSpeedBF16Config)
    for key in REFUSED_BF16_KEYS:
        if bf16.get(key):
            raise UserError(f"{path}: remove bf16.{key}, a growth needs fp32 masters and moments.")


def _check_zero(path: str, raw: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = raw.setdefault("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        raise UserError(f'{path}: zero_optimization must be a JSON object, such as {{"stage": 2}}.')
    if type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in range(4):
        raise UserError(f"{path}: zero_optimization.stage is {zero['stage']!r}; it must be 0, 1, 2 or 3.")
    _check_section(path, "zero_optimization", zero, DeepSpeedZeroConfig)
    for key, field in DeepSpeedZeroConfig.model_fields.items():
        extra = field.json_schema_extra
        if key in zero and isinstance(extra, dict) and extra.get("deprecated"):
            raise UserError(f"{path}: zero_optimization.{key} is deprecated; use {extra['new_param']}.")
    _check_offload(zero, path)


def _check_offload(zero: dict[str, Any], path: str) -> None:
    """Raise UserError where the section `zero_optimization` offloads what its ZeRO stage cannot."""
    stage = zero.get("stage", 0)
    if _offloads(zero, "offload_param") and stage != 3:
        raise UserError(f"{path}: offload_param needs ZeRO stage 3, but the stage is {stage}.")
    if _offloads(zero, "offload_optimizer") and stage == 0:
        raise UserError(f"{path}: offload_optimizer needs ZeRO stage 1, 2 or 3, but the stage is 0.")
    for key in ("offload_param", "offload_optimizer"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise UserError(f"{path}: {key} to nvme is not supported; use cpu.")


def _check_section(path: str, name: str, content: dict[str, Any], model: type[BaseModel]) -> None:
    """Raise UserError, with the nearest known key, where DeepSpeed would refuse a section."""
    try:
        model(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        if first["type"] != "extra_forbidden":
            raise UserError(f"{path}: {where} is {first['input']!r}: {first['msg']}.") from None
        *parents, key = first["loc"]
        known = _fields(model, [str(parent) for parent in parents])
        raise UserError(f"{path}: unknown key {where!r}{_nearest(str(key), known)}") from None


def _fields(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Keys of the section `model`, or of the one inside it that `parents` lead to."""
    for parent in parents:
        inner = [model.model_fields[parent].annotation, *get_args(model.model_fields[parent].annotation)]
        model = next(hint for hint in inner if isinstance(hint, type) and issubclass(hint, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]


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
        _check_offload(config["zero_optimization"], f"zero_stage {zero_stage} of a stage")
    config.setdefault("steps_per_print", 2**31)
    return config
