"""The optimizer step: few launches, one wait, DeepSpeed's results, and no step with gradients that are not finite."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import utils
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_stacking.engine import factory as factories
from ds_stacking.engine import gradients, optimizers, stepping
from ds_stacking.engine.gradients import ROW, GradientSums, clip_factor, global_norm
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.state import KINDS
from tests.engine import counting
from tests.engine.tiny import SEED, factory, part_loss, replaced, spec, train
from tests.ranks import run_ranks

distributed = pytest.mark.distributed
CASES = [(stage, bf16) for stage in range(4) for bf16 in (False, True)]
"""ZeRO stage, and whether in bf16."""
MOST_LAUNCHES, MOST_WAITS = 30, 1
"""Launches per parameter group, and waits, of an optimizer step outside of forward and backward passes."""

DeepSpeeds = partial(replaced, factories, "adopt", lambda engine: None)


def counts(bf16: bool) -> dict[str, tuple[int, int, int]]:
    """Launches, waits and the most launches by case; 4 layers, since the number of tensors must not matter."""
    counting.LAYERS = 4
    found = {}
    for stage in range(4):
        # DeepSpeed gathers weights of ZeRO 3 that stay whole after a step, with a copy for each
        whole: dict[str, Any] = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        for groups in (2, 6):
            for accumulation in (1, 4):
                seen = counting.count(stage, bf16=bf16, groups=groups, accumulation=accumulation, **whole)
                case = f"ZeRO {stage}, {accumulation} micro-batches, {groups} groups"
                found[case] = (seen.launches, seen.waits, MOST_LAUNCHES * groups)
    with DeepSpeeds():
        seen = counting.count(2, bf16=True, groups=6, accumulation=1)
    return found | {"DeepSpeed's own": (seen.launches, seen.waits, MOST_LAUNCHES * 6)}


@distributed
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_is_few_launches_and_one_wait(bf16: bool) -> None:
    found = run_ranks(2, counts, bf16)[0]
    print(found)
    launches, waits, most = found.pop("DeepSpeed's own")
    assert launches > most and waits > MOST_WAITS  # what the test would see otherwise
    for case, (launches, waits, most) in found.items():
        assert launches <= most and waits <= MOST_WAITS, case


def curve(stage: int, bf16: bool, accumulation: int) -> tuple[list[float], float, str]:
    """Losses over a growth, the last norm of the gradient, and the optimizer's class."""
    manager = StageManager(factory(stage, bf16=bf16), seed=SEED)
    manager.start(spec(1, accumulation))
    losses = train(manager, 0, 3)
    manager.grow(spec(2, accumulation))
    losses += train(manager, 3, 3)
    return losses, float(manager.engine.get_global_grad_norm() or 0.0), type(manager.engine.optimizer).__name__


def curves() -> dict[tuple[int, bool, int], list[Any]]:
    found = {}
    for stage, bf16 in CASES:
        for accumulation in (1, 3):
            ours = curve(stage, bf16, accumulation)
            with DeepSpeeds():
                theirs = curve(stage, bf16, accumulation) if stage or bf16 else None
            found[stage, bf16, accumulation] = [ours, theirs]
    return found


@distributed
def test_it_trains_as_deepspeed_does() -> None:
    """Up to the rounding of the norm, fp32 in rows here and fp64 there, which moves what is clipped by it."""
    found = run_ranks(2, curves)[0]
    for (stage, bf16, _), ((losses, norm, name), theirs) in found.items():
        expected = ["SkippingAdamW", "Zero12", "Zero12", "Zero3"][stage] if not (bf16 and stage == 0) else "Zero0"
        assert name == expected
        if theirs is None:
            losses_there, norm_there = found[1, False, 1][1][:2]
        else:
            losses_there, norm_there, name_there = theirs
            assert name_there != name
        assert losses == pytest.approx(losses_there, rel=1e-3 if bf16 else 1e-5), (stage, bf16)
        assert norm == pytest.approx(norm_there, rel=1e-2 if bf16 else 1e-4), (stage, bf16)


def state_of(engine: Any) -> list[Tensor]:
    state = LiveState(engine)
    return [state.read(piece, kind).clone() for piece in state.slices() for kind in KINDS]


def skipped(stage: int, bf16: bool, fault: float, accumulation: int) -> dict[str, Any]:
    """One good step, then one whose loss is multiplied by `fault` on the last rank alone, then a good one."""
    manager = StageManager(factory(stage, bf16=bf16), seed=SEED)
    engine = manager.start(spec(2, accumulation))
    train(manager, 0, 1)
    before = state_of(engine)
    taken, tokens = [], torch.arange(16)[None] % 60 + 5

    def losses(factor: float) -> Any:
        for _ in range(accumulation):
            yield part_loss(engine, tokens, torch.arange(16)[None] % 4 == 0, 4 * accumulation) * factor

    last = dist.get_rank() == dist.get_world_size() - 1
    taken.append(stepping.optimizer_step(engine, losses(fault if last else 1.0)))
    kept = all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
    left = [name for name, parameter in engine.module.named_parameters() if parameter.grad is not None]
    norm = float(engine.get_global_grad_norm())
    taken.append(stepping.optimizer_step(engine, losses(1.0)))
    moved = not all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
    finite = all(bool(torch.isfinite(part).all()) for part in state_of(engine))
    return {
        "taken": taken, "skipped_steps": engine.skipped_steps, "kept": kept, "left": left, "norm": norm,
        "moved": moved, "finite": finite,
    }  # fmt: skip


def skips() -> list[dict[str, Any]]:
    return [
        skipped(stage, bf16, fault, accumulation)
        for stage, bf16 in CASES
        for fault, accumulation in ((math.nan, 1), (math.inf, 3))
    ]


@distributed
def test_all_ranks_skip_what_is_not_finite_on_one() -> None:
    """A rank's fault reaches all, no moment is touched, and the next step is as any other."""
    ranks = run_ranks(2, skips)
    assert len(ranks[0]) == 2 * len(CASES)
    for case in ranks[0] + ranks[1]:
        assert case == {
            "taken": [False, True], "skipped_steps": 1, "kept": True, "left": [], "norm": math.inf, "moved": True,
            "finite": True,
        }  # fmt: skip


def aborted(stage: int, bf16: bool) -> bool:
    """Whether a step after one that ended in its second micro-batch is as the same step without that."""
    states = []
    for abort in (False, True):
        manager = StageManager(factory(stage, bf16=bf16), seed=SEED)
        engine = manager.start(spec(2, 3))
        train(manager, 0, 1)
        tokens, predicted = torch.arange(16)[None] % 60 + 5, torch.arange(16)[None] % 4 == 0

        def losses(most: int, engine: Any = engine, tokens: Tensor = tokens, predicted: Tensor = predicted) -> Any:
            for number in range(3):
                if number == most:
                    raise torch.OutOfMemoryError("injected")
                yield part_loss(engine, tokens, predicted, 12)

        if abort:
            with pytest.raises(torch.OutOfMemoryError):
                stepping.optimizer_step(engine, losses(1))
        stepping.optimizer_step(engine, losses(3))
        states.append(state_of(engine))
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def aborts() -> list[bool]:
    return [aborted(stage, bf16) for stage, bf16 in CASES if stage < 3]


@distributed
def test_half_a_step_leaves_nothing_behind() -> None:
    assert run_ranks(1, aborts)[0] == [True] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_as_exact_as_its_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = (0, 1, ROW - 1, 3 * ROW, 40 * ROW + 17)
    flats = [torch.randn(size, generator=generator).mul_(1e-3).to(dtype) for size in sizes]
    exact = math.sqrt(sum(float(flat.double().square().sum()) for flat in flats))
    assert float(global_norm(flats)) == pytest.approx(exact, rel=1e-7)
    for fault in (math.nan, math.inf, -math.inf, 1e30):  # 1e30 is finite, but no square of it
        for flat in flats[1:]:
            last, flat[-1] = flat[-1].clone(), fault
            assert not torch.isfinite(global_norm(flats))
            flat[-1] = last
    forgotten: Callable[..., Tensor] = lambda rows, **_: rows.new_zeros(1, dtype=torch.float32)  # noqa: E731
    monkeypatch.setattr(gradients.torch.linalg, "vector_norm", forgotten)
    assert float(global_norm(flats)) != pytest.approx(exact, rel=1e-7)  # what the test would see otherwise


def test_clipping_is_torchs() -> None:
    for size, clip in ((2.0, 0.5), (0.01, 0.5), (2.0, 0.0)):
        flat = torch.full((1000,), size)
        parameter = torch.nn.Parameter(torch.zeros(1000))
        parameter.grad = flat.clone()
        torch.nn.utils.clip_grad_norm_([parameter], clip or math.inf)
        torch.testing.assert_close(flat * clip_factor(global_norm([flat]), clip), parameter.grad, rtol=1e-5, atol=0)


def test_sums_lie_where_the_weights_lie() -> None:
    """Padded as asked, zeros for a parameter without a gradient, summed in fp32 and rounded once."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((2, 3), (5,), (1,))]
    sums = GradientSums(parameters, sums=torch.float32, padding=[2, 0, 3], numel=20)
    values = [1.0, *[2.0**-10] * 8]  # in bf16, 1 + 2^-10 is 1
    for value in values:
        for parameter in parameters[:2]:
            parameter.grad = torch.full_like(parameter, value)
        sums.add()
        assert all(parameter.grad is None for parameter in parameters)
    total = torch.tensor(sum(values)).bfloat16()
    assert total != 1
    expected = torch.zeros(20, dtype=torch.bfloat16)
    expected[:6] = expected[8:13] = total
    assert torch.equal(sums.take(), expected)
    parameters[2].grad = torch.ones(1, dtype=torch.bfloat16)
    alone = sums.take()  # nothing is left of the sums before
    assert alone.sum() == 1 and alone[13] == 1


@pytest.mark.parametrize("fault", [math.nan, math.inf, 1e30])
def test_a_plain_optimizer_skips_what_is_not_finite_or_has_no_norm(fault: float) -> None:
    """1e30 is finite, but no square of it: clipped by its norm it would be a step with gradients of zero."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = optimizers.SkippingAdamW([weight], clip=1.0, lr=0.1)
    engine: Any = SimpleNamespace(communication_data_type=torch.float32, bfloat16_enabled=lambda: False)
    optimizer.prepare(engine)
    for value, refused in ((1.0, False), (fault, True), (1.0, False)):
        weight.grad, before = torch.full((4,), value), weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.overflow == refused == torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 2


READ: list[Any] = [
    *(getattr(DeepSpeedZeroOptimizer, name) for name in (
        "step", "reduce_gradients", "independent_gradient_partition_epilogue", "setup_buckets", "_optimizer_step",
        "scaled_global_norm", "unscale_and_clip_grads", "has_overflow", "create_gradient_handling_hooks",
        "flatten_dense_tensors_aligned", "_update_model_bit16_weights",
    )),
    *(getattr(DeepSpeedZeroOptimizer_Stage3, name) for name in (
        "step", "_get_norm_groups", "get_grad_norm_direct", "partition_grads", "unscale_and_clip_grads",
    )),
    FP16_UnfusedOptimizer.step, FP16_UnfusedOptimizer.unscale_and_clip_grads,
    *(getattr(DeepSpeedEngine, name) for name in (
        "coalesce_grad_reduction", "_flush_coalesced_reduction_zero12", "no_sync", "allreduce_gradients",
        "_backward_epilogue", "_take_model_step", "backward",
    )),
    utils.combine_grad_norm_groups, utils.is_invalid_grad_norm, utils.all_gather_dp_groups,
]  # fmt: skip
"""What the file replaces or relies on, in DeepSpeed."""


def test_what_is_replaced_is_what_was_read() -> None:
    """Where this fails, read the methods of the new version, see the tests above pass, and add it."""
    sources = "".join(inspect.getsource(inspect.unwrap(method)) for method in READ)
    assert (
        hashlib.sha256(sources.encode()).hexdigest()
        == "3d7c5c2ed0a390bfef1c8415815d6905150ba1d1edb7283d8539c77926748ef5"
    )


def test_an_unknown_version_keeps_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "READ_AGAINST", ("0.0.1",))
    optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    optimizer.cpu_offload = optimizer.overlap_comm = False
    engine: Any = SimpleNamespace(optimizer=optimizer)
    with pytest.warns(UserWarning, match=r"its own is taken.*install deepspeed==0.0.1"):
        optimizers.adopt(engine)
    assert type(optimizer) is DeepSpeedZeroOptimizer
