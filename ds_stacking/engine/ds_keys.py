"""Every key of DeepSpeed's configuration that the installed version knows, and what becomes of it here.

A key works, which means that a test trains with it through a growth (tests/engine/test_ds_growth.py), or is refused in
one sentence. docs/deepspeed.md shows this table; tests/engine/test_ds_keys.py compares it with DeepSpeed's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ALL = (0, 1, 2, 3)
FLAT = (1, 2)
"""ZeRO stages that lay each parameter group out in one flat tensor."""
OFF = (None, False, "auto")
"""Values that switch a key off; 0 counts as false."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, with its sections before it: `zero_optimization.stage`."""

    name: str
    refused: str = ""
    """Why it is refused; empty where it works."""
    others: bool = False
    """Whether grow_engine minds it in engines of others too, since it bears on the state that a growth moves."""
    harmless: tuple[Any, ...] = OFF
    """Values with which it changes nothing, for engines of others."""
    switch: str = ""
    """The key inside a section refused whole that has such a value where the section is switched off."""
    stages: tuple[int, ...] = ALL
    """ZeRO stages in which it has an effect."""
    values: str = ""
    """What it may be, in words, where DeepSpeed itself checks too late or not at all."""
    check: Callable[[Any], bool] = lambda value: True
    """Whether a value is one of these."""

    def idle(self, value: Any) -> bool:
        """Whether the key with this value changes nothing."""
        if isinstance(value, dict):
            return bool(self.switch) and value.get(self.switch) in self.harmless
        return value in self.harmless


def _works(
    *names: str,
    stages: tuple[int, ...] = ALL,
    values: str = "",
    check: Callable[[Any], bool] = lambda value: True,
    others: bool = False,
) -> list[Key]:
    return [Key(name=name, stages=stages, values=values, check=check, others=others) for name in names]


def _refused(
    reason: str, *names: str, others: bool = False, harmless: tuple[Any, ...] = OFF, switch: str = ""
) -> list[Key]:
    return [Key(name=name, refused=reason, others=others, harmless=harmless, switch=switch) for name in names]


def _within(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(value: Any, least: int = 1, most: int = 2**63 - 1) -> bool:
    """Whether it is a whole number in a range; people write 5e8."""
    return type(value) in (int, float) and least <= value <= most and value == int(value)


def _even(value: Any) -> bool:
    return _whole(value, 2, MOST_IN_BUCKET) and value % 2 == 0


def _or_auto(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """ "auto" is what the section's default is, or for the recipe's keys what the recipe says."""
    return lambda value: value == "auto" or check(value)


def _in_memory(value: Any) -> bool:
    return value in ("none", "cpu")


MOST_IN_BUCKET = 10**11
"""Elements of a buffer that DeepSpeed allocates: more than any device holds."""
MEMORY = '"none" or "cpu"'
FLAG = "true or false"
NOT_SAVED = "checkpoints are written by this program, never by DeepSpeed"
AVERAGED = "the loss is already normalised over the global batch"
TRACKED = "--tracking and metrics.jsonl record a run"
NO_PARALLELISM = "only data-parallel engines are grown"
NVME = "optimizer state and weights live on the device or, offloaded, in host memory"
SERVED = "it serves other uses than training"

TOP = [
    *_works(
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        values='"auto" or a whole number above 0',
        check=_or_auto(_whole),
    ),
    *_works(
        "gradient_clipping",
        values='"auto" or a number from 0 up',
        check=_or_auto(lambda value: type(value) in (int, float) and 0 <= value < float("inf")),
    ),
    *_works("bf16.enabled", values='"auto", true or false', check=lambda value: _flag(value) or value == "auto"),
    *_works("bf16.check_grad_overflow", values=FLAG, check=_flag),
    *_works(
        "data_types.grad_accum_dtype",
        values='"auto", "fp32" or "bf16"',
        check=lambda value: value in ("auto", "fp32", "bf16"),
    ),
    *_works("communication_data_type", values='"fp32" or "bf16"', check=lambda value: value in ("fp32", "bf16")),
    *_works(*_within("comms_logger", "enabled", "prof_all"), values=FLAG, check=_or_auto(_flag)),
    *_works(
        "comms_logger.prof_ops",
        values="a list of names",
        check=_or_auto(lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)),
    ),
    *_works(*_within("comms_logger", "verbose", "debug"), values=FLAG, check=_or_auto(_flag)),
    *_works("timers.throughput.enabled", "timers.throughput.synchronized", values=FLAG, check=_or_auto(_flag)),
    *_works("disable_python_gc", "dump_state", "wall_clock_breakdown", values=FLAG, check=_flag),
    *_works("zero_force_ds_cpu_optimizer", stages=(1, 2, 3), values=FLAG, check=_flag),
    *_works(
        "steps_per_print",
        values="a whole number above 0",
        check=lambda value: type(value) is int and _whole(value),
    ),
    *_works(
        "log_level",
        values="debug, info, warning, error or critical",
        check=lambda value: value in ("debug", "info", "warning", "error", "critical"),
    ),
    *_refused("the recipe's `optimizer` sets it", "optimizer"),
    *_refused("the recipe's `schedule` and stages set the learning rate", "scheduler"),
    *_refused(
        "training runs in bf16 or fp32, set by --precision", "fp16", "torch_autocast", others=True, switch="enabled"
    ),
    *_refused('it is the old name of "bf16"', "bfloat16"),
    *_refused(
        "a growth needs fp32 masters and moments",
        "bf16.bf16_master_weights_and_grads",
        "bf16.bf16_optimizer_states",
        others=True,
    ),
    *_refused("it belongs to an optimizer of DeepSpeed that is not used here", "bf16.immediate_grad_update"),
    *_refused(
        "weights are bf16 or fp32 as --precision says, and buffers stay as the model made them",
        *_within("data_types", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    ),
    *_refused("every optimizer used here is tested", "zero_allow_untested_optimizer"),
    *_refused(AVERAGED, "gradient_predivide_factor", "prescale_gradients", "gradient_allreduce_op"),
    *_refused(
        "a growth must know where an optimizer step ends",
        "managed_gradient_accumulation",
        others=True,
        harmless=(None, True),
    ),
    *_refused(
        "models recompute activations by the recipe's `model.gradient_checkpointing`", "activation_checkpointing"
    ),
    *_refused("the recipe's `compile` compiles a model block by block", "compile", others=True, switch="deepcompile"),
    *_refused("the ledger counts FLOPs, and the profiler replaces functions of torch", "flops_profiler"),
    *_refused("it collects garbage several times a step, which then takes ten times as long", "memory_breakdown"),
    *_refused(TRACKED, "tensorboard", "wandb", "csv_monitor", "comet"),
    *_refused(NOT_SAVED, "checkpoint", "datastates_ckpt"),
    *_refused("the data pipeline of this program makes the batches", "data_efficiency", others=True, switch="enabled"),
    *_refused("the data pipeline of this program makes the batches", "dataloader_drop_last"),
    *_refused("nothing in DeepSpeed reads it any more", "disable_allgather", "vocabulary_size", "allgather_size"),
    *_refused(NO_PARALLELISM, "pipeline", "data_parallel_size", "use_data_before_expert_parallelism"),
    *_refused(NO_PARALLELISM, "seq_parallel_communication_data_type"),
    *_refused(NO_PARALLELISM, "sequence_parallel_size", others=True, harmless=(*OFF, 1)),
    *_refused(NO_PARALLELISM, "tensor_parallel", others=True, harmless=(*OFF, 1), switch="autotp_size"),
    *_refused(NO_PARALLELISM, "expert_parallel", others=True, switch="enabled"),
    *_refused(SERVED, "hybrid_engine", others=True, switch="enabled"),
    *_refused(SERVED, "autotuning", "weight_quantization"),
    *_refused(NVME, "aio"),
    *_refused(
        "DeepSpeed itself has removed it",
        *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
        *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
    ),
]
"""Keys of the top level and of its sections but `zero_optimization`."""

ZERO = [
    *_works("stage", values="0, 1, 2 or 3", check=lambda value: type(value) is int and value in ALL),
    *_works(
        "overlap_comm",
        stages=(1, 2, 3),
        values="true, false or null",
        check=_or_auto(lambda value: value is None or _flag(value)),
    ),
    *_works("contiguous_gradients", "reduce_scatter", stages=(1, 2, 3), values=FLAG, check=_or_auto(_flag)),
    *_works(
        "reduce_bucket_size",
        stages=(1, 2, 3),
        values=f"a whole number from 1 to {MOST_IN_BUCKET:,}",
        check=_or_auto(lambda value: _whole(value, 1, MOST_IN_BUCKET)),
    ),
    *_works(
        *("use_multi_rank_bucket_allreduce", "round_robin_gradients", "parameter_alignment"),
        stages=FLAT,
        values=FLAG,
        check=_or_auto(_flag),
    ),
    *_works("allgather_bucket_size", stages=FLAT, values="an even number above 0", check=_even),
    *_works("ignore_unused_parameters", stages=(2,), values=FLAG, check=_or_auto(_flag)),
    *_works("offload_optimizer.device", stages=(1, 2, 3), values=MEMORY, check=_in_memory, others=True),
    *_works("offload_param.device", stages=(3,), values=MEMORY, check=_in_memory, others=True),
    *_works("offload_optimizer.pin_memory", stages=(1, 2, 3), values=FLAG, check=_or_auto(_flag)),
    *_works("offload_param.pin_memory", stages=(3,), values=FLAG, check=_or_auto(_flag)),
    *_works("sub_group_size", stages=(3,), values="a whole number above 0", check=_or_auto(_whole)),
    *_works(
        "stage3_prefetch_bucket_size",
        stages=(3,),
        values=f"a whole number from 0 to {MOST_IN_BUCKET:,}",
        check=_or_auto(lambda value: _whole(value, 0, MOST_IN_BUCKET)),
    ),
    *_works(
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
        stages=(3,),
        values="a whole number from 0 up",
        check=_or_auto(lambda value: _whole(value, 0)),
    ),
    *_works(
        *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "memory_efficient_linear"),
        *("log_trace_cache_warnings", "enable_sanity_checks"),
        stages=(3,),
        values=FLAG,
        check=_or_auto(_flag),
    ),
    *_refused(
        "the part of the optimizer that stays on the device would keep the learning rate 0",
        "offload_optimizer.ratio",
        others=True,
        harmless=(None, "auto", 1.0),
    ),
    *_refused(
        "it needs CUDA, so that no test here can run it",
        *("offload_optimizer.super_offload", "zenflow"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        others=True,
    ),
    *_refused("it works with super_offload only", "offload_optimizer.cpuadam_cores_perc"),
    *_refused(
        "growth is not tested with a second copy of the weights",
        "zero_hpz_partition_size",
        others=True,
        harmless=(*OFF, 1),
    ),
    *_refused(
        NVME,
        *_within("offload_optimizer", "nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
        *_within("offload_param", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
    ),
    *_refused("the norm of the gradient is logged and watched", "compute_grad_norm"),
    *_refused(
        NOT_SAVED,
        *("load_from_fp32_weights", "elastic_checkpoint", "pipeline_loading_checkpoint"),
        "stage3_gather_16bit_weights_on_model_save",
    ),
    *_refused(
        "with modules that are gathered as one, DeepSpeed fails on the tied embedding",
        *("stage3_module_granularity_threshold", "leaf_module"),
    ),
    *_refused("nothing in DeepSpeed reads it any more", "allgather_partitions"),
    *_refused(
        "no model is made here in the context of deepspeed.zero.Init, to which it belongs", "override_module_apply"
    ),
    *_refused("no recipe trains with Muon", "save_muon_momentum_buffer_in_memory"),
    *_refused(
        "DeepSpeed itself has removed it",
        *("legacy_stage1", "mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"),
    ),
    *_refused("it is deprecated; use offload_optimizer", "cpu_offload"),
    *_refused("it is deprecated; use offload_param", "cpu_offload_param"),
    *_refused("it is deprecated; use pin_memory of offload_param or offload_optimizer", "cpu_offload_use_pin_memory"),
    *_refused("it is deprecated, and " + NOT_SAVED, "stage3_gather_fp16_weights_on_model_save"),
]
"""Keys of `zero_optimization`, named without it."""

KEYS: dict[str, Key] = {
    key.name: key for key in [*TOP, *(Key(**{**vars(key), "name": f"zero_optimization.{key.name}"}) for key in ZERO)]
}
"""The whole table by name."""

SECTIONS = {".".join(parts[:depth]) for name in KEYS for parts in [name.split(".")] for depth in range(1, len(parts))}
"""What has keys in it: `zero_optimization`, `zero_optimization.offload_param`, ..."""
