"""DeepSpeed's optimizers with a step of few launches and one wait, whatever the number of tensors and groups.

DeepSpeed 0.19.8 looks at every gradient tensor for what is not finite (five launches each), casts each to fp64 for the
norm, and asks the device once or twice per parameter group. Here one norm over everything is the look as well, and the
host reads one number: whether the step is taken. Only the step and the way of gradients into it are replaced; state,
layout and checkpoints stay DeepSpeed's. What each method replaces was read in `READ_AGAINST`; with another version
DeepSpeed's own methods stay, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_stacking.engine.gradients import GradientSums, average, clip_factor, give, global_norm

READ_AGAINST = ("0.19.8",)
"""Versions of DeepSpeed whose methods are known; tests/engine/test_optimizers.py holds their sources."""


class FlatGradients:
    """An optimizer that takes the gradients of each parameter group as one flat tensor."""

    sums: list[GradientSums]
    """Those of this rank, by parameter group."""
    overflow: bool
    """What DeepSpeed reads: whether the last step was not taken."""

    def add_gradients(self) -> None:
        """Take what a backward pass has left in the parameters."""
        for group in self.sums:
            group.add()

    def forget_gradients(self) -> None:
        """Drop what has been taken, and what the parameters still have."""
        for group in self.sums:
            group.forget()

    def reduce_gradients(self) -> None:
        """Average the sums over ranks, after a step's last backward pass. Collective."""
        raise NotImplementedError

    def look(self, norm: Tensor, *, checked: bool = True) -> None:
        """Keep the norm and whether it forbids the step, which the host must know: the one wait of a step."""
        self.overflow = checked and not bool(torch.isfinite(norm))
        self._global_grad_norm = float("inf") if self.overflow else norm


class Zero12(FlatGradients, DeepSpeedZeroOptimizer):
    """ZeRO 1 and 2 with the optimizer's state on the device."""

    def prepare(self, engine: DeepSpeedEngine) -> None:
        """Make what the methods below need; gradients stay in the parameters until they are taken."""
        sums = sum_type(engine)
        self.sums = [
            GradientSums(group, sums=sums or flat.dtype, padding=padding, numel=flat.numel())
            for group, flat, padding in zip(
                self.round_robin_bit16_groups, self.bit16_groups_flat, self.round_robin_bit16_padding, strict=True
            )
        ]
        self.parts: list[Tensor] = []
        hooks: list[Any] = self._grad_acc_hooks  # they would copy each gradient into a bucket
        while hooks:
            hooks.pop().remove()

    def setup_buckets(self) -> None:
        """There are none."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients over ranks at the end of a step's last backward pass, and keep this rank's parts."""
        if not self.is_gradient_accumulation_boundary():
            return
        self.parts = []
        for sums, group in zip(self.sums, self.real_dp_process_group, strict=True):
            flat = sums.take().to(self.communication_data_type)
            average(flat, group, self.reduce_bucket_size)
            self.parts.append(flat.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """What DeepSpeed calls under ZeRO 2, and where several backward passes are over."""
        self.reduce_gradients()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One AdamW step of this rank's parts, or none on any rank where a gradient is not finite."""
        norm = global_norm(self.parts, over_ranks=self.dp_process_group)
        parts, self.parts = self.parts, []
        self.look(norm, checked=self.dtype != torch.bfloat16 or self.check_grad_overflow)
        if self.overflow:
            return
        factor = clip_factor(norm, self.clip_grad)
        for index, part in enumerate(parts):
            master = self.single_partition_of_fp32_groups[index]
            master.grad = part * factor  # fp32
            self._optimizer_step(index)
            master.grad = None
        self._gather()

    def _gather(self) -> None:
        """Cast the masters, and bring every rank's new weights to all."""
        groups = zip(self.parallel_partitioned_bit16_groups, self.real_dp_process_group, strict=True)
        mine = [partitions[dist.get_rank(ranks)] for partitions, ranks in groups]
        torch._foreach_copy_(mine, self.single_partition_of_fp32_groups)
        for flat, part, ranks in zip(self.bit16_groups_flat, mine, self.real_dp_process_group, strict=True):
            if dist.get_world_size(ranks) > 1:
                dist.all_gather_into_tensor(flat, part, group=ranks)


class WholeGradients(FlatGradients):
    """ZeRO 0: every rank has all weights and all gradients."""

    clip_grad: float

    def lay_out(self, groups: Sequence[Sequence[Tensor]], engine: DeepSpeedEngine) -> None:
        """Make what the methods below need; `groups` are the model's parameters."""
        self.sums = whole_groups(groups, sum_type(engine))
        self.flats: list[Tensor] = []
        self.communicated = engine.communication_data_type

    def reduce_gradients(self) -> None:
        """Average the gradients over ranks."""
        self.flats = [sums.take().to(self.communicated) for sums in self.sums]
        for flat in self.flats:
            average(flat, None, flat.numel())

    def clipped(self) -> list[Tensor]:
        """The gradients in fp32, clipped by their norm; none where one is not finite, or the norm is beyond fp32."""
        flats, self.flats = self.flats or [sums.take() for sums in self.sums], []
        norm = global_norm(flats)
        self.look(norm)
        factor = clip_factor(norm, self.clip_grad)
        return [] if self.overflow else [flat * factor for flat in flats]


class Zero0(WholeGradients, FP16_UnfusedOptimizer):
    """ZeRO 0 in bf16, with fp32 masters."""

    def prepare(self, engine: DeepSpeedEngine) -> None:
        """Take over from DeepSpeed's class."""
        self.lay_out(self.fp16_groups, engine)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One AdamW step of the masters, or none where a gradient is not finite."""
        flats = self.clipped()
        if self.overflow:
            return
        for flat, masters in zip(flats, self.fp32_groups, strict=True):
            give(masters, flat)
        self.optimizer.step()
        for working, masters in zip(self.fp16_groups, self.fp32_groups, strict=True):
            give(masters, None)
            torch._foreach_copy_(working, masters)


class SkippingAdamW(WholeGradients, torch.optim.AdamW):
    """AdamW of ZeRO stage 0 in fp32, where DeepSpeed has no optimizer of its own to clip and to skip a step."""

    overflow = False

    def __init__(self, groups: Any, *, clip: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.clip_grad = clip

    def prepare(self, engine: DeepSpeedEngine) -> None:
        """Know the engine that it is of."""
        self.lay_out([group["params"] for group in self.param_groups], engine)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The step, or nothing where a gradient is not finite."""
        flats = self.clipped()
        if self.overflow:
            return None
        for flat, sums in zip(flats, self.sums, strict=True):
            give(sums.parameters, flat)
        return super().step()


class Zero3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3 with the optimizer's state on the device: its one norm is taken of all gradients at once."""

    def prepare(self, engine: DeepSpeedEngine) -> None:
        """Nothing is needed."""

    def _get_norm_groups(self) -> list[Tensor]:
        return [global_norm([self.grad_partitions_flat_buffer], over_ranks=self.dp_process_group)]


def adopt(engine: DeepSpeedEngine) -> None:
    """Give the engine's optimizer the methods of this file, where they do all that its configuration asks for."""
    optimizer = engine.optimizer
    if isinstance(optimizer, SkippingAdamW):
        optimizer.prepare(engine)
        return
    lean: Any = {
        DeepSpeedZeroOptimizer: Zero12,
        FP16_UnfusedOptimizer: Zero0,
        DeepSpeedZeroOptimizer_Stage3: Zero3,
    }.get(type(optimizer))
    offloads = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    overlaps = lean is Zero12 and optimizer.overlap_comm  # reduces while a backward pass runs
    if lean is None or offloads or overlaps:
        return
    if deepspeed.__version__ not in READ_AGAINST:
        warnings.warn(
            f"The optimizer step of DeepSpeed {deepspeed.__version__} is not known here, so its own is taken, with "
            f"some 15 launches per tensor and a wait per group; install deepspeed=={READ_AGAINST[-1]} for ours.",
            stacklevel=2,
        )
        return
    optimizer.__class__ = lean
    optimizer.prepare(engine)


def sum_type(engine: DeepSpeedEngine) -> torch.dtype | None:
    """In which type the gradients of micro-batches are summed; None is that of the weights."""
    if not engine.bfloat16_enabled() or engine._config.grad_accum_dtype == "bf16":
        return None
    return torch.float32


def whole_groups(groups: Sequence[Sequence[Tensor]], sums: torch.dtype | None) -> list[GradientSums]:
    """Sums of groups that every rank updates whole."""
    return [
        GradientSums(group, sums=sums or group[0].dtype, padding=[0] * len(group), numel=sum(p.numel() for p in group))
        for group in groups
    ]
