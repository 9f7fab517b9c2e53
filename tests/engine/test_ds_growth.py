"""Training through a growth with every key of DeepSpeed's configuration that works, against plain PyTorch.

Many keys go into each run, in values that are not the default; test_ds_keys.py checks that no key is missing.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from deepspeed.utils import logger

from ds_stacking.engine.stage_manager import StageManager
from tests.engine.tiny import SEED, PlainTorch, factory, spec, train
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 3

TOP = {
    "communication_data_type": "fp32",
    "comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"], "verbose": False, "debug": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "disable_python_gc": True,
    "dump_state": True,
    "log_level": "error",
    "steps_per_print": 1,
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "wall_clock_breakdown": True,
    "bf16": {"enabled": "auto", "check_grad_overflow": False},
}
LAYOUT = {
    "overlap_comm": True,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 700,
    "use_multi_rank_bucket_allreduce": False,
    "round_robin_gradients": True,
    "parameter_alignment": True,
    "allgather_bucket_size": 400,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
FETCH = {
    "overlap_comm": False,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 700,
    "sub_group_size": 900,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 50,
    "stage3_model_persistence_threshold": 500,
    "stage3_max_live_parameters": 100,
    "stage3_max_reuse_distance": 0,
    "memory_efficient_linear": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run through a growth."""

    zero: dict[str, Any]
    top: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False

    def config(self) -> dict[str, Any]:
        return {"zero_optimization": self.zero, **self.top}


RUNS = {
    "0": Run(zero={"stage": 0}, top=TOP),
    "1": Run(zero={"stage": 1, **LAYOUT}, top=TOP),
    "2": Run(zero={"stage": 2, **LAYOUT, "ignore_unused_parameters": False}, top=TOP),
    # without overlap_comm the optimizer step is ours
    "1 ours": Run(zero={"stage": 1, **LAYOUT, "overlap_comm": False}, top=TOP),
    "2 ours": Run(zero={"stage": 2, **LAYOUT, "overlap_comm": False}, top=TOP),
    "3": Run(zero={"stage": 3, **FETCH}, top=TOP),
    "1 offloaded": Run(zero={"stage": 1, **OFFLOAD, "round_robin_gradients": True}),
    "2 offloaded": Run(
        zero={"stage": 2, **OFFLOAD, "contiguous_gradients": False, "overlap_comm": True},
        top={"zero_force_ds_cpu_optimizer": False},
    ),
    "3 offloaded": Run(
        zero={"stage": 3, **OFFLOAD, **FETCH, "offload_param": {"device": "cpu", "pin_memory": False}},
        top={"zero_force_ds_cpu_optimizer": True},
    ),
    "1 forced": Run(
        zero={"stage": 1, **OFFLOAD, "parameter_alignment": True}, top={"zero_force_ds_cpu_optimizer": True}
    ),
    "3 by all-reduce": Run(zero={"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}),
    "3 one by one": Run(zero={"stage": 3, "stage3_allgather_sequential": True}),
    **{f"{stage} bf16": Run(zero={"stage": stage}, top=TOP, bf16=True) for stage in range(4)},
}


def through_growth(run: Run) -> list[float]:
    """Losses of STEPS steps, a growth, and STEPS steps."""
    engines = replace(factory(0, bf16=run.bf16), ds_config=run.config())
    manager = StageManager(engines, seed=SEED)
    manager.start(spec(2, 2))
    losses = train(manager, 0, STEPS)
    manager.grow(spec(4, 2))
    losses += train(manager, STEPS, STEPS)
    manager.close()
    assert gc.isenabled(), "disable_python_gc outlives its engine"
    return losses


def all_runs() -> dict[str, list[float]]:
    level = logger.level
    found = {}
    for name, run in RUNS.items():
        found[name] = through_growth(run)
        logger.setLevel(level)
    found["fault"] = _without_moments()
    return found


def _without_moments() -> list[float]:
    manager = StageManager(factory(0), seed=SEED)
    manager.start(spec(2, 2))
    losses = train(manager, 0, STEPS)
    manager.grow(spec(4, 2), optimizer_state="reset")
    return losses + train(manager, STEPS, STEPS)


def test_every_configuration_trains_as_plain_pytorch_does() -> None:
    plain = PlainTorch(2)
    expected = plain.train(0, STEPS)
    plain.grow(4, "stack", "stack")
    expected += plain.train(STEPS, STEPS)
    found = run_ranks(2, all_runs)[0]
    assert found.pop("fault") != pytest.approx(expected, rel=2e-2)
    for name, losses in found.items():
        assert losses == pytest.approx(expected, rel=2e-2 if RUNS[name].bf16 else 1e-5), name
