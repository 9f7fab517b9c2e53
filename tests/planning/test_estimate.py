"""The planner: known corners, monotony, the table and its refusals; and its error on a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig, RunConfig
from ds_stacking.models.flops import training_flops
from ds_stacking.planning.calibration import calibrate
from ds_stacking.planning.collectives import bytes_sent, calls_of_step, latency
from ds_stacking.planning.estimate import plan_run, saved_share
from ds_stacking.planning.gpus import GPUS, gpu_spec_named, gpu_spec_of
from ds_stacking.planning.text import calibration_table, make_cluster, plan_table, with_vocabulary

LARGE = ModelConfig(hidden_size=1024, num_heads=16, vocab_size=30528)


def run(**fields: object) -> RunConfig:
    return RunConfig(model=LARGE, stages="6:100,24:100", tokens_per_step=2**22, micro_batch_size=512, **fields)


def cluster(nodes: int, gpus_per_node: int = 8):
    return make_cluster(gpu_spec_named("h100"), nodes=nodes, gpus_per_node=gpus_per_node, mfu=0.4)


def test_one_gpu_talks_to_nobody_and_computes_at_the_assumed_rate() -> None:
    plan = plan_run(run(), cluster(1, 1), zero_stage=2)[1]
    assert plan.communication_seconds == 0
    flops = training_flops(LARGE, 24, sequences=2**16, length=64, masked=2**22 * 0.15)
    assert plan.flops == pytest.approx(flops)
    assert plan.step_seconds == pytest.approx(flops / (0.4 * 989.4e12), rel=0.01)


def test_1024_gpus_are_slower_each_but_faster_together() -> None:
    few, many = (plan_run(run(), cluster(nodes), zero_stage=2)[1] for nodes in (1, 128))
    assert few.step_seconds / 128 < many.step_seconds < few.step_seconds
    assert many.communication_seconds > few.communication_seconds


@pytest.mark.parametrize("zero_stage", range(1, 4))
def test_a_higher_zero_stage_never_takes_more_memory(zero_stage: int) -> None:
    plan = plan_run(run(), cluster(1), zero_stage=2)[1]
    assert plan.memory[zero_stage].total <= plan.memory[zero_stage - 1].total


def parameters_sent(zero_stage: int, accumulation: int = 1) -> float:
    calls = calls_of_step(1_000_000, zero_stage=zero_stage, accumulation=accumulation, bucket=50_000_000)
    return sum(bytes_sent(call, 4) for call in calls) / 1_000_000 / (3 / 4)


def test_bytes_sent_per_parameter_are_those_of_deepspeeds_calls() -> None:
    """An all-reduce of 2 bytes sends 4, a gather or a scatter 2."""
    assert [parameters_sent(stage) for stage in range(4)] == pytest.approx([4, 6, 6, 6])
    assert [parameters_sent(stage, 5) for stage in range(4)] == pytest.approx([4, 6, 6, 30])


def test_latencies_are_those_of_nccls_own_model() -> None:
    """By hand, in microseconds: 128 nodes of 8 have 896 hops inside and 127 between nodes in a ring, log2(128) = 7."""
    many, one = {"nodes": 128, "gpus_per_node": 8, "link": 450e9}, {"nodes": 1, "gpus_per_node": 8, "link": 450e9}
    assert latency("all-gather", **many) == pytest.approx((8.4 + 896 * 3.4 + 127 * 14) * 1e-6)
    assert latency("all-reduce", **many) == pytest.approx((8.4 + 2 * (7 * 4 + 7 * 14)) * 1e-6)
    assert latency("reduce-scatter", **one) == pytest.approx((8.4 + 7 * 3.4) * 1e-6)
    assert latency("all-reduce", **one) == pytest.approx((8.4 + 2 * 7 * 3.4) * 1e-6), (
        "in a node the ring is the shorter"
    )
    assert latency("all-gather", nodes=1, gpus_per_node=4, link=32e9) == pytest.approx((8.4 + 3 * 5.7) * 1e-6)


def test_a_step_at_scale_by_hand() -> None:
    """ZeRO-2 on 128 x 8: P weights in 7 buckets; 6 P bytes through 400 GB/s; 8 all-reduces and 2 gathers wait."""
    plan = plan_run(run(), cluster(128), zero_stage=2)[1]
    weights = plan.parameters
    assert 6 < weights / 50e6 < 7
    moving = 6 * weights * 1023 / 1024 / 400e9
    waiting = 8 * (8.4 + 2 * 126) * 1e-6 + 2 * (8.4 + 896 * 3.4 + 127 * 14) * 1e-6
    assert plan.communication_seconds == pytest.approx(moving + waiting)
    assert plan.communication_bytes == pytest.approx(6 * weights * 1023 / 1024)


@pytest.mark.parametrize(
    ("zero_stage", "once", "accumulated"),
    [
        (0, 2 + 2 + 12, 2 + 2 + 4 + 12),
        (1, 2 + 2 + 12 / 8, 2 + 2 + 4 + 12 / 8),
        (2, 2 + 2 + 12 / 8, 2 + 2 + 4 + 12 / 8),
        (3, 2, 18 / 8),
    ],
)
def test_gradients_of_all_weights_are_held_while_they_accumulate(
    zero_stage: int, once: float, accumulated: float
) -> None:
    """Bytes per weight on one of 8 GPUs: weights, gradients and their fp32 sums, masters and moments."""
    found = []
    for micro in (2**13, 2**12):
        config = RunConfig(model=LARGE, stages="24:100", tokens_per_step=2**22, micro_batch_size=micro)
        big = replace(cluster(1), gpu=replace(gpu_spec_named("h100"), memory=1e15))
        (plan,) = plan_run(config, big, zero_stage=zero_stage)
        assert plan.accumulation == 2**13 // micro
        found.append(plan.memory[zero_stage].states / plan.parameters)
    assert found == pytest.approx([once, accumulated])


def test_shallow_stages_take_larger_micro_batches() -> None:
    shallow, deep = plan_run(
        run(), make_cluster(gpu_spec_named("l4"), nodes=1, gpus_per_node=8, mfu=0.4), zero_stage=2
    )
    assert shallow.micro_batch_size > deep.micro_batch_size
    assert shallow.micro_batch_size * shallow.accumulation == deep.micro_batch_size * deep.accumulation


def test_stacking_saves_what_the_shallow_stages_leave_out() -> None:
    plans = plan_run(run(), cluster(1), zero_stage=2)
    spent = 100 * plans[0].step_seconds + 100 * plans[1].step_seconds + plans[1].growth_seconds
    assert saved_share(plans) == pytest.approx(1 - spent / (200 * plans[1].step_seconds))


def test_the_table_names_what_does_not_fit() -> None:
    config = run(kernels="torch")
    text = plan_table(config, plan_run(config, cluster(128), zero_stage=2), cluster(128))
    assert "128 x 8 GPUs" in text and "stage 2: 24 layers" in text and "DOES NOT FIT" not in text
    tiny = make_cluster(gpu_spec_named("l4"), nodes=1, gpus_per_node=1, mfu=0.4)
    huge = RunConfig(model=ModelConfig(hidden_size=4096, num_heads=32, vocab_size=50000), stages="24:1")
    assert "DOES NOT FIT" in plan_table(huge, plan_run(huge, tiny, zero_stage=2), tiny)


def test_a_vocabulary_is_completed() -> None:
    assert with_vocabulary(RunConfig()).model.vocab_size == 4096
    assert with_vocabulary(RunConfig(tokenizer="google-bert/bert-base-uncased")).model.vocab_size == 30528
    assert with_vocabulary(run()).model.vocab_size == 30528


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L4", "l4"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_devices_are_recognised(name: str, part: str) -> None:
    assert gpu_spec_of(name) is GPUS[part]


def test_an_unknown_device_has_no_peak() -> None:
    assert gpu_spec_of("Quadro T1000") is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean h100"):
        gpu_spec_named("h10")
    for sizes, message in (((0, 8, 0.4), "0 nodes"), ((1, 8, 1.5), "--mfu is 1.5")):
        with pytest.raises(UserError, match=message):
            make_cluster(gpu_spec_named("h100"), nodes=sizes[0], gpus_per_node=sizes[1], mfu=sizes[2])
    with pytest.raises(UserError, match="do not divide by 24 GPUs; give --tokens_per_step a multiple of 1,536"):
        plan_run(run(), cluster(3), zero_stage=2)


def test_a_run_says_how_well_its_stages_predict_one_another(tmp_path: Path) -> None:
    """Seconds of a step are 1 + layers, and double on the processor in the second stage."""
    records, step, wall, cpu, flops = [], 0, 100.0, 50.0, 0.0
    for stage, layers in enumerate((2, 4, 8)):
        for _ in range(3):
            step, wall, flops = step + 5, wall + 5 * (1 + layers), flops + 5e9 * layers
            cpu += 5 * (1 + layers) * (2 if stage == 1 else 1)
            clocks = {"training_seconds": wall, "cpu_seconds": cpu}
            records.append({"kind": "train", "step": step, "stage": stage, "layers": layers, "flops": flops, **clocks})
    records.append({"kind": "eval", "step": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "summary.json").write_text('{"finished": true}')
    by_wall, by_cpu = calibrate(tmp_path)
    assert by_wall.errors == pytest.approx([0, 0, 0], abs=1e-9)
    assert by_cpu.errors[1] == pytest.approx(-0.5)
    assert "4 layers: 10,000.0 ms a step, predicted 5,000.0 ms, error -50.0%" in calibration_table(by_cpu)
    path.write_text("\n".join(map(json.dumps, records[:6])))
    with pytest.raises(UserError, match="has 2 stages"):
        calibrate(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        calibrate(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "has no summary.json of a finished run"),
        ("summary.json", '{"finished": false}', "has not finished"),
        ("summary.json", "[", "summary.json is damaged"),
        ("metrics.jsonl", None, "has no metrics.jsonl of a finished run"),
        ("metrics.jsonl", "null\n", "metrics.jsonl line 1 is damaged"),
        ("metrics.jsonl", '{"kind": "train", "step": "x"}\n', "line 1 is damaged or no such file: step"),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "stage": 0}\n', "has 0 stages"),
        (
            "metrics.jsonl",
            "".join(f'{{"kind": "train", "step": 1, "stage": {i}}}\n' for i in range(1001)),
            "1,000 stages",
        ),
        (
            "metrics.jsonl",
            "".join(f'{{"kind": "train", "step": {i}, "stage": {i // 2}}}\n' for i in range(6)),
            "tells no 'training_seconds'",
        ),
    ],
)
def test_a_run_that_is_damaged_or_unfinished_is_one_sentence(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    (tmp_path / "summary.json").write_text('{"finished": true}')
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        calibrate(tmp_path)
