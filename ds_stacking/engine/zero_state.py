"""The training state of a live engine by parameter name: fp32 masters, moments and step counts, for ZeRO 0 to 3.

DeepSpeed keeps each parameter group as one flat fp32 tensor, of which every rank holds a part (ZeRO 1-3), or as
separate tensors on every rank (ZeRO 0). Here each layout becomes a list of *fragments*: the elements of a parameter
that this rank holds, and where they lie. Everything else works on fragments and does not know the ZeRO stage.

DeepSpeed's own `safe_get/set_full_*` need the state to exist, gather whole tensors, leave the 16-bit copies stale and
fail for sizes that the world size does not divide (ZeRO-3); none of that holds here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from ds_stacking.engine.epsilon import set_count
from ds_stacking.growth.state import Kind, StateWriter, TensorSlice


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of one parameter that this rank's optimizer updates; it may be empty."""

    name: str
    """The parameter."""
    start: int
    """First element of the flattened parameter."""
    stop: int
    """One past the last element."""
    master: Tensor
    """The optimizer's fp32 tensor that holds the elements; the key of its state."""
    offset: int
    """Where they begin in the flattened `master`."""
    group: int
    """Index of the parameter group."""


class LiveState(StateWriter):
    """Reads and writes a live engine's state.

    Building it materialises the optimizer's state where no step was taken yet: moments 0, step 0.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.fragments = {fragment.name: fragment for fragment in _fragments(engine)}
        self.base = base_optimizer(engine)
        for fragment in self.fragments.values():
            materialise(self.base, fragment.master)

    def slices(self) -> list[TensorSlice]:
        """What this rank's optimizer updates; under ZeRO 0, everything on every rank."""
        return [TensorSlice(f.name, f.start, f.stop) for f in self.fragments.values() if f.start < f.stop]

    def read(self, piece: TensorSlice, kind: Kind) -> Tensor:
        """A view into the engine: [N] float32."""
        fragment = self.fragments[piece.name]
        assert fragment.start <= piece.start <= piece.stop <= fragment.stop, f"{piece} is not on this rank"
        tensor = fragment.master if kind == "master" else self.base.state[fragment.master][kind]
        start = fragment.offset + piece.start - fragment.start
        return tensor.detach().view(-1)[start : start + piece.numel]

    def steps(self) -> dict[str, int]:
        """Adam's step count of every parameter; every rank knows them all."""
        masters = {fragment.master for fragment in self.fragments.values()}  # few: each costs a wait for the device
        steps = {master: int(self.base.state[master]["step"]) for master in masters}
        return {name: steps[fragment.master] for name, fragment in self.fragments.items()}

    def commit(self, steps: Mapping[str, int]) -> None:
        """Set the step counts and refresh the working copies of the weights from the masters. Collective."""
        by_master: dict[Tensor, set[int]] = {}
        for fragment in self.fragments.values():
            by_master.setdefault(fragment.master, set()).add(steps[fragment.name])
        for master, values in by_master.items():
            assert len(values) == 1, f"one parameter group cannot have the step counts {sorted(values)}"
            _set_step(self.base.state[master], values.pop())
        for fragment in self.fragments.values():
            set_count(self.base.param_groups[fragment.group], steps[fragment.name])
        refresh_working_copies(self.engine)


def parameter_numels(module: nn.Module) -> dict[str, int]:
    """Elements of every trainable parameter, in the module's order; right under ZeRO-3 too."""
    return {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that holds the moments, under whatever wrapper."""
    optimizer = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def materialise(optimizer: torch.optim.Optimizer, master: Tensor) -> None:
    """Give `master` the state that the optimizer would make at its first step."""
    state = optimizer.state[master]
    if state:
        return
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        state["step"] = torch.tensor(0.0, device=master.device if on_device else "cpu")
    else:
        state["step"] = 0
    state["exp_avg"] = torch.zeros_like(master.detach(), dtype=torch.float32)
    state["exp_avg_sq"] = torch.zeros_like(master.detach(), dtype=torch.float32)


def _set_step(state: dict, step: int) -> None:
    """torch's Adam and AdamW keep the step in a tensor, FusedAdam and DeepSpeedCPUAdam in an int."""
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step


def _fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _zero3_fragments(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        flats, masters = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
        return _flat_fragments(optimizer.bit16_groups, flats, masters, optimizer.real_dp_process_group, names)
    if isinstance(optimizer, BF16_Optimizer):
        flats, masters = optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition
        return _flat_fragments(optimizer.bf16_groups, flats, masters, optimizer.real_dp_process_group, names)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return _whole_fragments(optimizer.fp16_groups, optimizer.fp32_groups, names)
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
        return _whole_fragments(groups, groups, names)
    raise NotImplementedError(f"The state of {type(optimizer).__name__} cannot be read by name.")


def _whole_fragments(groups: list, masters: list, names: Mapping[Tensor, str]) -> Iterator[Fragment]:
    """ZeRO 0: every rank holds every parameter; the master is the parameter itself in fp32."""
    for index, (group, group_masters) in enumerate(zip(groups, masters, strict=True)):
        for parameter, master in zip(group, group_masters, strict=True):
            yield Fragment(
                name=names[parameter], start=0, stop=parameter.numel(), master=master, offset=0, group=index
            )


def _flat_fragments(groups: list, flats: list, masters: list, ranks: list, names: Mapping) -> Iterator[Fragment]:
    """ZeRO 1 and 2: a group's parameters lie one after another in a flat tensor, cut into equal parts for the ranks.

    Where a parameter lies is read off its storage, which is right whatever order and padding DeepSpeed chose.
    """
    for index, (group, flat, master) in enumerate(zip(groups, flats, masters, strict=True)):
        begin = torch.distributed.get_rank(ranks[index]) * master.numel()
        for parameter in group:
            at = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            assert 0 <= at <= flat.numel() - parameter.numel(), f"{names[parameter]} does not lie in its group"
            start = min(max(0, begin - at), parameter.numel())
            stop = max(start, min(parameter.numel(), begin + master.numel() - at))
            yield Fragment(
                name=names[parameter], start=start, stop=stop, master=master, offset=at + start - begin, group=index
            )


def _zero3_fragments(optimizer: DeepSpeedZeroOptimizer_Stage3, names: Mapping[Tensor, str]) -> Iterator[Fragment]:
    """ZeRO 3: every parameter is cut into equal parts for the ranks, the last one padded."""
    for index, (group, master) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        offset = 0
        for parameter in group:
            part = parameter.partition_numel()
            start = min(optimizer._get_param_partition_rank(parameter) * part, parameter.ds_numel)
            stop = min(start + part, parameter.ds_numel)
            group_index = optimizer.sub_group_to_group_id[index]
            yield Fragment(
                name=names[parameter], start=start, stop=stop, master=master, offset=offset, group=group_index
            )
            offset += part


@torch.no_grad()
def refresh_working_copies(engine: DeepSpeedEngine) -> None:
    """Make the weights that the forward pass uses equal to the cast masters, on all ranks. Collective.

    After a write the next forward pass would otherwise still use the old weights.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and engine.device.type == "cpu":
        _refresh_by_broadcasts(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for working, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(working, masters, strict=True):
                parameter.copy_(master)


def _refresh_by_broadcasts(optimizer: DeepSpeedZeroOptimizer) -> None:
    """What `update_lp_params` does; gloo gathers four times more slowly than it broadcasts."""
    groups = (
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.single_partition_of_fp32_groups,
        optimizer.real_dp_process_group,
    )
    for partitions, master, ranks in zip(*groups, strict=True):
        partitions[torch.distributed.get_rank(ranks)].copy_(master)
        for rank, partition in enumerate(partitions):
            torch.distributed.broadcast(partition, torch.distributed.get_global_rank(ranks, rank), group=ranks)
