"""DeepSpeed configurations: the shipped ones are good, bad ones are refused in one sentence, numbers must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.engine.ds_config import load_ds_config, offloads_optimizer, resolve_ds_config

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def load(folder: Path, content: Any) -> dict[str, Any]:
    """Load a configuration; `content` is its text or a value to be written as JSON."""
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_ds_config(str(path))


def resolve(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "zero_stage": None,
        "bf16": True,
        "clip": 1.0,
        "micro_batch_size": 4,
        "accumulation": 3,
        "world_size": 2,
    }
    return resolve_ds_config(raw, **(values | changes))


def zero(**fields: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **fields}}


def test_all_six_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_take_everything_from_the_recipe(path: Path) -> None:
    raw = load_ds_config(str(path))
    config = resolve(raw)
    assert config["zero_optimization"]["stage"] == int(path.stem[4])
    assert offloads_optimizer(config) == path.stem.endswith("_offload")
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] is True
    assert resolve(raw, bf16=False)["bf16"]["enabled"] is False, "resolving must not change what was loaded"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[1]", "its content: input should be an object, and is [1]"),
        ("[" * 100_000, "is no JSON (recursion"),
        ('{"a":' * 100_000, "is no JSON (recursion"),
        ('{"steps_per_print":' + "9" * 5000 + "}", "is no JSON"),
        (" " * (1 << 20) + "{}", "has more than 1,048,576 bytes"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e999}}', "reduce_bucket_size is inf; it must be a whole"),
        ('{"zero_optimization": {"sub_group_size": NaN}}', "sub_group_size is nan; it must be a whole number above 0"),
        ({"x" * 10_000: 1}, "unknown key 'xxx"),
        ({"log_level": "x" * 10_000}, "...; it must be debug"),
        ({"train_batch_size": "many"}, """train_batch_size is 'many'; it must be "auto" or a whole number above 0."""),
        ({"train_batch_size": True}, "train_batch_size is True; it must be"),
        ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu is '4'; it must be"),
        ({"gradient_accumulation_steps": [3]}, "gradient_accumulation_steps is [3]; it must be"),
        ({"gradient_clipping": True}, """gradient_clipping is True; it must be "auto" or a number from 0 up."""),
        ({"gradient_clipping": "x"}, "gradient_clipping is 'x'; it must be"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan; it must be"),
        ({"steps_per_print": 10**30}, "steps_per_print is 1000000000000000000000000000000; it must be"),
        ({"comms_logger": {"enabled": 1}}, "comms_logger.enabled is 1; it must be true or false."),
        ({"comms_logger": {"prof_ops": [1]}}, "comms_logger.prof_ops is [1]; it must be a list of names."),
        (
            zero(reduce_bucket_size=-5),
            "reduce_bucket_size is -5; it must be a whole number from 1 to 100,000,000,000.",
        ),
        (zero(reduce_bucket_size=10**30), "it must be a whole number from 1 to 100,000,000,000."),
        (zero(reduce_bucket_size=True), "reduce_bucket_size is True; it must be"),
        (zero(reduce_bucket_size="5"), "reduce_bucket_size is '5'; it must be"),
        (zero(allgather_bucket_size=10**30), "; it must be an even number above 0."),
        (zero(sub_group_size=0), "sub_group_size is 0; it must be a whole number above 0."),
        (zero(stage3_max_live_parameters=10**30), "; it must be a whole number from 0 up."),
        (zero(overlap_comm="yes"), "overlap_comm is 'yes'; it must be true, false or null."),
        (zero(offload_optimizer={"device": "cpu", "pin_memory": 1}), "pin_memory is 1; it must be true or false."),
        ({"zero_optimizaton": {"stage": 2}}, "unknown key 'zero_optimizaton'; did you mean zero_optimization?"),
        ({"optimizer": {"type": "Adam"}}, "remove 'optimizer', the recipe's `optimizer` sets it."),
        ({"fp16": {"enabled": True}}, "remove 'fp16', training runs in bf16 or fp32"),
        ({"optimizer": None}, "remove 'optimizer', the recipe's `optimizer` sets it."),
        ('{"dump_state": true, "dump_state": false}', "the key 'dump_state' stands there twice; keep one."),
        ({"dump_state": 1}, "dump_state is 1; it must be true or false."),
        ({"steps_per_print": 0}, "steps_per_print is 0; it must be a whole number above 0."),
        ({"communication_data_type": "fp16"}, """communication_data_type is 'fp16'; it must be "fp32" or "bf16"."""),
        ({"log_level": "loud"}, "log_level is 'loud'; it must be debug, info, warning, error or critical."),
        ({"comms_logger": {"prof_ops": 3}}, "comms_logger.prof_ops is 3"),
        ({"comms_logger": {"prof_op": []}}, "unknown key 'comms_logger.prof_op'; did you mean prof_ops?"),
        ({"timers": {"throughput": {"enabled": "loud"}}}, "timers.throughput.enabled is 'loud'"),
        ({"timers": {"thruput": {}}}, "unknown key 'timers.thruput'; did you mean throughput?"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types.grad_accum_dtype is 'fp64'"),
        ({"data_types": {"param_dtype": "bf16"}}, "remove 'data_types.param_dtype', weights are bf16 or fp32"),
        ({"compile": {"deepcompile": True}}, "remove 'compile', the recipe's `compile` compiles"),
        ({"flops_profiler": {"enabled": True}}, "remove 'flops_profiler', the ledger counts FLOPs"),
        ({"activation_checkpointing": {}}, "remove 'activation_checkpointing'"),
        (zero(allgather_bucket_size=401), "allgather_bucket_size is 401; it must be an even number above 0."),
        (zero(mics_shard_size=2), "remove 'zero_optimization.mics_shard_size', DeepSpeed itself has removed it."),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "would keep the learning rate 0."),
        (zero(zenflow={"topk_ratio": 0.1}), "remove 'zero_optimization.zenflow', it needs CUDA"),
        (zero(offload_optimizer="cpu"), "zero_optimization.offload_optimizer must be a JSON object."),
        (zero(stge=1), "unknown key 'zero_optimization.stge'; did you mean stage?"),
        (
            zero(offload_optimizer={"devic": "cpu"}),
            "unknown key 'zero_optimization.offload_optimizer.devic'; did you mean device?",
        ),
        (zero(offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device is 'gpu'"),
        (zero(stage3_prefetch_bucket=1), "did you mean stage3_prefetch_bucket_size?"),
        (zero(stage=4), "zero_optimization.stage is 4; it must be 0, 1, 2 or 3."),
        (zero(stage="2"), "zero_optimization.stage is '2'; it must be 0, 1, 2 or 3."),
        (zero(reduce_bucket_size="big"), "zero_optimization.reduce_bucket_size is 'big'"),
        (zero(cpu_offload=True), "remove 'zero_optimization.cpu_offload', it is deprecated; use offload_optimizer."),
        (zero(offload_param={"device": "cpu"}), "offload_param needs ZeRO stage 3, but the stage is 2."),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "offload_optimizer needs ZeRO stage 1, 2 or 3"),
        (zero(offload_optimizer={"device": "nvme"}), """device is 'nvme'; it must be "none" or "cpu"."""),
        (zero(stage=None), "zero_optimization.stage is None; it must be 0, 1, 2 or 3."),
        ({"zero_optimization": 2}, "zero_optimization must be a JSON object"),
        ({"bf16": True}, "bf16 must be a JSON object."),
        ({"bf16": {"enabled": 2}}, 'bf16.enabled is 2; it must be "auto", true or false.'),
        ({"bf16": {"enabld": True}}, "unknown key 'bf16.enabld'; did you mean enabled?"),
        ({"bf16": {"bf16_optimizer_states": True}}, "a growth needs fp32 masters and moments."),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, content: Any, part: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, content)
    message = str(error.value)
    assert part in message and str(tmp_path / "ds.json") in message
    assert message[-1] in ".?" and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("value", [5e8, "auto", 1])
def test_what_people_write_is_taken(tmp_path: Path, value: Any) -> None:
    raw = load(tmp_path, zero(reduce_bucket_size=value, overlap_comm=None, contiguous_gradients="auto"))
    assert resolve(raw)["zero_optimization"]["reduce_bucket_size"] == value


def test_what_deepspeed_itself_refuses_is_refused_before_there_is_an_engine() -> None:
    """The table may miss what a new version refuses."""
    raw = {"zero_optimization": {"stage": 1, "new": 1}}
    with pytest.raises(UserError, match=r"^DeepSpeed refuses the configuration \(.+\); mend --deepspeed_config"):
        resolve(raw)
    with pytest.raises(UserError, match="DeepSpeed refuses the configuration .*sum"):
        resolve({"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        load_ds_config(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match="Is a directory"):
        load_ds_config(str(tmp_path))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no JSON"):
        load_ds_config(str(tmp_path / "binary.json"))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("train_micro_batch_size_per_gpu", 4, 8),
        ("gradient_accumulation_steps", 3, 1),
        ("train_batch_size", 24, 12),
        ("gradient_clipping", 1.0, 0.5),
    ],
)
def test_numbers_must_agree_with_the_recipe(tmp_path: Path, key: str, good: float, bad: float) -> None:
    assert resolve(load(tmp_path, {key: good}))[key] == good
    assert resolve(load(tmp_path, {key: "auto"}))[key] == good
    with pytest.raises(UserError, match=f'sets {key} to {bad}, but the recipe makes it {good}; write "auto" there'):
        resolve(load(tmp_path, {key: bad}))


def test_precision_must_agree(tmp_path: Path) -> None:
    raw = load(tmp_path, {"bf16": {"enabled": True}})
    assert resolve(raw, bf16=True)["bf16"]["enabled"] is True
    with pytest.raises(UserError, match="sets bf16.enabled to True, but the precision is fp32"):
        resolve(raw, bf16=False)


@pytest.mark.parametrize(
    ("asked", "zero_stage", "bf16", "accumulation", "given"),
    [
        (None, 3, True, 2, "fp32"),
        ("auto", 3, True, 2, "fp32"),
        ("bf16", 3, True, 2, "bf16"),
        (None, 3, True, 1, None),
        (None, 3, False, 2, None),
        ("fp32", 0, True, 2, None),
        (None, 1, True, 2, None),
        ("bf16", 2, True, 2, "bf16"),
        ("fp32", 2, False, 2, None),
    ],
)
def test_gradients_are_summed_in_fp32(
    tmp_path: Path, asked: str | None, zero_stage: int, bf16: bool, accumulation: int, given: str | None
) -> None:
    content = zero(stage=zero_stage) | ({"data_types": {"grad_accum_dtype": asked}} if asked else {})
    config = resolve(load(tmp_path, content), bf16=bf16, accumulation=accumulation)
    assert config.get("data_types", {}).get("grad_accum_dtype") == given


def test_sums_in_bf16_need_bf16(tmp_path: Path) -> None:
    raw = load(tmp_path, {"data_types": {"grad_accum_dtype": "bf16"}})
    with pytest.raises(UserError, match="sums gradients in bf16, but the precision is fp32"):
        resolve(raw, bf16=False)


def test_a_stage_may_choose_its_zero_stage(tmp_path: Path) -> None:
    raw = load(tmp_path, zero())
    assert resolve(raw, zero_stage=3)["zero_optimization"]["stage"] == 3
    assert resolve(raw)["zero_optimization"]["stage"] == 2


def test_a_stage_cannot_choose_what_the_offload_forbids(tmp_path: Path) -> None:
    raw = load(tmp_path, zero(stage=3, offload_param={"device": "cpu"}))
    with pytest.raises(UserError, match="zero_stage 2 of a stage: offload_param needs ZeRO stage 3"):
        resolve(raw, zero_stage=2)


def test_null_and_none_offload_nothing(tmp_path: Path) -> None:
    for offload in (None, {"device": "none"}):
        assert not offloads_optimizer(load(tmp_path, zero(offload_optimizer=offload)))
    assert not offloads_optimizer(load(tmp_path, {}))
    assert offloads_optimizer(load(tmp_path, zero(offload_optimizer={"device": "cpu"})))
