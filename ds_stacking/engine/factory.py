"""Builds DeepSpeed engines: the model of a depth, its parameter groups, the optimizer, the resolved configuration."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from filelock import FileLock
from torch import nn

from ds_stacking.common.environment import check_meeting_place, local_rank, rank
from ds_stacking.common.errors import UserError
from ds_stacking.config import OptimizerConfig
from ds_stacking.engine.agreement import all_ranks_or_none
from ds_stacking.engine.construct import construct_partitioned
from ds_stacking.engine.ds_config import offloads_optimizer, resolve_ds_config
from ds_stacking.engine.epsilon import uncorrected_epsilon
from ds_stacking.engine.optimizers import SkippingAdamW, adopt
from ds_stacking.growth.plan import ParameterInfo, parameter_groups

Engine = DeepSpeedEngine
"""The engine's type, for rooms that must not import deepspeed."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What may differ from stage to stage."""

    layers: int
    """Transformer blocks."""
    micro_batch_size: int
    """Sequences that one rank holds at a time."""
    accumulation: int = 1
    """Micro-batches of one optimizer step on one rank."""
    zero_stage: int | None = None
    """ZeRO stage; None takes the DeepSpeed configuration's."""


@dataclass(frozen=True, kw_only=True)
class EngineFactory:
    """Builds the engine of any stage of a run."""

    build_model: Callable[[int, bool], nn.Module]
    """(layers, initialize) -> model; without `initialize` its weights need no values, they will be overwritten."""
    ds_config: Mapping[str, Any]
    """The DeepSpeed configuration as loaded (ds_stacking.engine.ds_config)."""
    optimizer: OptimizerConfig
    """AdamW and clipping."""
    bf16: bool
    """16-bit working copies with fp32 masters, or fp32 throughout."""
    layer_by_layer: bool = False
    """Whether every module of the model fills its parameters by `reset_parameters` and nowhere else: then under ZeRO 3
    no rank ever holds more than one module whole."""

    def build(
        self, spec: EngineSpec, parameters: Mapping[str, ParameterInfo] | None = None, *, initialize: bool = True
    ) -> DeepSpeedEngine:
        """A new engine; `parameters` fixes the parameter groups of a grown model. All ranks call it together."""
        config = self._config(spec)
        with all_ranks_or_none("making the model"):
            model = self.construct(spec.layers, initialize, config)
        if parameters is None:
            parameters = self.parameter_infos(model)
        optimizer = self._make_optimizer(self._groups(model, parameters), config)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        if not self.optimizer.clip and hasattr(engine.optimizer, "check_grad_overflow"):
            # in fp32 DeepSpeed looks for gradients that are not finite only where it clips them
            engine.optimizer.check_grad_overflow = True
        adopt(engine)
        return engine

    def try_memory(self, spec: EngineSpec, parameters: int) -> None:
        """Take the device memory of an engine's weights and optimizer state, and give it back; no other rank is asked.

        So a rank without room fails here, where no other waits for it in a collective call. Raises
        torch.OutOfMemoryError.
        """
        config, ranks = self._config(spec), torch.distributed.get_world_size()
        stage = config["zero_optimization"].get("stage", 0)
        weights = (2 if self.bf16 else 4) * parameters // (ranks if stage == 3 else 1)
        part = parameters // (ranks if stage else 1)
        masters = 0 if stage == 0 and not self.bf16 else 1  # the weights are the masters there
        sizes = [weights, *[4 * part] * (masters + 2)]
        if offloads_optimizer(config):
            sizes = [weights]
        if stage == 3 and config["zero_optimization"].get("offload_param"):
            sizes = []
        taken = [torch.empty(size, dtype=torch.uint8, device=device()) for size in sizes]
        del taken
        get_accelerator().empty_cache()

    def _config(self, spec: EngineSpec) -> dict[str, Any]:
        return resolve_ds_config(
            dict(self.ds_config),
            zero_stage=spec.zero_stage,
            bf16=self.bf16,
            clip=self.optimizer.clip,
            micro_batch_size=spec.micro_batch_size,
            accumulation=spec.accumulation,
            world_size=torch.distributed.get_world_size(),
        )

    def construct(self, layers: int, initialize: bool, config: Mapping[str, Any]) -> nn.Module:
        """The model of an engine with this DeepSpeed configuration; under ZeRO 3 its parameters may be cut already."""
        if self.layer_by_layer and config["zero_optimization"]["stage"] == 3:
            return construct_partitioned(lambda: self.build_model(layers, initialize), config)
        return self.build_model(layers, initialize)

    def parameter_infos(self, model: nn.Module) -> dict[str, ParameterInfo]:
        """The trainable parameters of a first stage's model, in an engine or not.

        Biases and norms, which have one dimension, do not decay. ZeRO-3 leaves an empty tensor in the model and keeps
        the size and shape of the whole in `ds_numel` and `ds_shape`.
        """
        return {
            name: ParameterInfo(
                numel=getattr(p, "ds_numel", p.numel()),
                decay=self.optimizer.decay_all or len(getattr(p, "ds_shape", p.shape)) > 1,
            )
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def _groups(self, model: nn.Module, parameters: Mapping[str, ParameterInfo]) -> list[dict[str, Any]]:
        by_name = dict(model.named_parameters())
        return [
            {
                "params": [by_name[name] for name in names],
                "weight_decay": self.optimizer.weight_decay if parameters[names[0]].decay else 0.0,
                "birth": birth,
                **({} if self.optimizer.eps_correction else uncorrected_epsilon(self.optimizer.eps)),
            }
            for (birth, *_), names in parameter_groups(parameters)
        ]

    def _make_optimizer(self, groups: list[dict], config: dict[str, Any]) -> torch.optim.Optimizer:
        """AdamW where its state lives, one launch per flat group; the schedule sets the rate.

        PyTorch's fused AdamW reads and writes the same bytes as DeepSpeed's FusedAdam and needs no compiler.
        """
        settings: dict[str, Any] = {"lr": 0.0, "betas": self.optimizer.betas, "eps": self.optimizer.eps}
        if offloads_optimizer(config):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            load_cpu_adam()
            return DeepSpeedCPUAdam(groups, **settings)
        if config["zero_optimization"]["stage"] == 0 and not self.bf16:
            config["gradient_clipping"] = 0.0  # DeepSpeed would clip tensor by tensor, and before it looks
            return SkippingAdamW(groups, clip=self.optimizer.clip, fused=True, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)


def init_distributed(*, alone: bool = False, limit: timedelta | None = None) -> None:
    """Join the default process group; a process that no launcher started becomes the only rank.

    So does every process with `alone`, for engines of its own; under a launcher it keeps the device that it was given.
    `limit` is the longest that a collective call may take (without it DeepSpeed's 10 minutes hold), also in the group
    that DeepSpeed makes for itself, to which torch would give its own 10 minutes under NCCL.
    """
    if alone or "RANK" not in os.environ:
        only = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as probe:  # a fixed port might be another run's
            probe.bind((only["MASTER_ADDR"], 0))
            os.environ |= only | {"MASTER_PORT": str(probe.getsockname()[1])}
        os.environ.setdefault("LOCAL_RANK", "0")
    elif not torch.distributed.is_initialized():
        check_meeting_place()
    check_device()
    # torch 2.13 warns, once on every rank, of names that DeepSpeed 0.19 still calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On a CPU DeepSpeed would compile an all-reduce for its inference; load_cpu_adam says what that risks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(local_rank())
    asked = {} if limit is None else {"timeout": limit}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, **asked)
    if limit is not None:
        for group in (torch.distributed.group.WORLD, groups._clone_world_group()):
            torch.distributed.distributed_c10d._set_pg_timeout(limit, group)


def check_device() -> None:
    """Raise UserError where this rank's GPU is not there."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda" and local_rank() >= accelerator.device_count():
        raise UserError(
            f"Rank {rank()} is number {local_rank()} of its node and needs a GPU of its own, but torch sees "
            f"{accelerator.device_count()}; start fewer ranks, or look at CUDA_VISIBLE_DEVICES and DS_ACCELERATOR."
        )


def load_cpu_adam() -> None:
    """Compile DeepSpeedCPUAdam, or load what was compiled before, one process of this user at a time.

    torch guards compilations by a file that it deletes at the end. A process killed before that leaves it, and every
    later one would wait for ever. This lock ends with its process, so under it that file is a leftover.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = CPUAdamBuilder()
    folder = Path(_get_build_directory(builder.NAME, verbose=False))
    with FileLock(folder.with_name(f".{builder.NAME}.lock")):
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def device() -> torch.device:
    """The device of this rank's engine."""
    return torch.device(get_accelerator().current_device_name())


def native_bf16() -> tuple[bool, str]:
    """Whether this machine multiplies bf16 natively, and by what: GPUs from Ampere, CPUs with AVX512-BF16 or AMX."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        check_device()
        accelerator.set_device(local_rank())  # else every rank would begin on the first GPU
        return torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    if accelerator.device_name() != "cpu":
        return accelerator.is_bf16_supported(), accelerator.device_name()
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the CPU has avx512_bf16"
    return False, "the CPU has neither avx512_bf16 nor AMX"
