"""Whether the largest model of a run can be held at all: arithmetic, before anything is built or claimed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_stacking.common.environment import local_world_size, world_size
from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig, RunConfig
from ds_stacking.planning.memory import parameter_count, state_bytes

CONTAINER = Path("/sys/fs/cgroup/memory.max")
"""What the processes of a container may take together."""
OFFLOADS = ("offload_param", "offload_optimizer")


def refuse_what_cannot_fit(config: RunConfig, ds_config: Mapping[str, Any], there: float, *, bf16: bool) -> None:
    """Raise UserError where a stage's weights, gradients and optimizer state are larger than the memory of a rank.

    Activations and buffers do not count, nor what others have taken: what is refused could never run. States that are
    offloaded are not counted at all.
    """
    zero = ds_config["zero_optimization"]
    if any((zero.get(name) or {}).get("device", "none") != "none" for name in OFFLOADS):
        return
    stage = max(config.stages, key=lambda stage: stage.layers)
    parameters = count_parameters(config.model, stage.layers)
    needed = state_bytes(
        parameters,
        zero_stage=zero["stage"] if stage.zero_stage is None else stage.zero_stage,
        world_size=world_size(),
        item=2 if bf16 else 4,
    )
    if needed > there:
        raise UserError(
            f"The model of stage {stage.layers}:{stage.steps} has {parameters:,} parameters, which take {_gb(needed)} "
            f"on each rank with gradients and optimizer state, and a rank has {_gb(there)}; lower model.hidden_size, "
            f"the layers or the vocabulary, or take a higher ZeRO stage or more ranks."
        )


def memory(device: torch.device, container: Path = CONTAINER) -> float:
    """Bytes that one rank can have: of its GPU, or its share of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        total = min(total, int(container.read_text()))
    return total / local_world_size()


def count_parameters(model: ModelConfig, layers: int) -> int:
    """Without building ten thousand layers; a vocabulary that is not known yet counts little."""
    model = replace(model, vocab_size=model.vocab_size or 8)
    one, two = parameter_count(model, 1), parameter_count(model, 2)
    return one + (layers - 1) * (two - one)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
