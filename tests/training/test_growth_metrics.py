"""What is told of a growth, beside DeepSpeed's own gathered weights, moments and gradients, under every ZeRO stage."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_stacking.command_line import parse_run
from ds_stacking.training.growth_metrics import is_looked_at
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

KINDS = {"master": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def test_when_a_growth_is_looked_at() -> None:
    assert [steps for steps in range(1, 1200) if is_looked_at(steps)] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def reference(engine: Any, gradients: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What an observation must hold after a growth from 1 to 2 blocks, from whole tensors."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in (*KINDS, "gradient")}
    for name, parameter in engine.module.named_parameters():
        for kind, key in KINDS.items():
            if engine.zero_optimization_stage() == 0:
                found = parameter if key is None else engine.optimizer.state[parameter][key]
            elif key is None:
                found = safe_get_full_fp32_param(parameter)
            else:
                found = safe_get_full_optimizer_state(parameter, key)
            if name.startswith("blocks.") and len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
                whole[kind][name] = found.detach().double().flatten()
                whole["gradient"][name] = gradients[name].double().flatten()
    blocks = {
        kind: [torch.cat([v for n, v in tensors.items() if n.startswith(f"blocks.{i}.")]) for i in range(2)]
        for kind, tensors in whole.items()
    }
    weights, gradient = ([float(block.norm()) for block in blocks[kind]] for kind in ("master", "gradient"))
    cosines = {
        f"copy_cosine_{kind}": {"1": float(torch.nn.functional.cosine_similarity(*blocks[kind], dim=0))}
        for kind in KINDS
    }
    return cosines | {
        "weight_norm": {"0": weights[0], "1": weights[1]},
        "gradient_norm": {"0": gradient[0], "1": gradient[1]},
        "weight_norm_jump": {"1": weights[1] / weights[0]},
        "gradient_norm_jump": {"1": gradient[1] / gradient[0]},
    }


def runs(folder: str) -> list[list[dict]]:
    """A small run under every ZeRO stage; what its observations should be."""
    from deepspeed.utils import safe_get_full_grad

    from ds_stacking.training.run import pretrain

    gradients: dict[str, torch.Tensor] = {}
    expected: list[dict] = []

    def keep(name: str, parameter: torch.Tensor) -> None:
        """What the backward pass of this rank's only micro-batch has left."""
        assert parameter.grad is not None
        gradients[name] = parameter.grad.clone()

    def prepare(run: Any) -> None:
        """Keep the gradients of each step before it is taken, and what a look must find."""
        train_step, run.engine_seen = run.train_step, None
        record = run.metrics.record

        def recording(kind: str, values: Any) -> None:
            if kind == "after_growth":
                expected.append(reference(run.engine, gradients))
            record(kind, values)

        def recording_step(batches: Any) -> None:
            engine = run.engine
            if engine is not run.engine_seen:
                run.engine_seen, step, whole = engine, engine.step, engine.zero_optimization_stage() < 3
                for name, parameter in engine.module.named_parameters():
                    if whole:
                        parameter.register_post_accumulate_grad_hook(partial(keep, name))

                def recorded(*args: Any, **options: Any) -> Any:
                    for name, parameter in engine.module.named_parameters():
                        if whole:
                            dist.all_reduce(gradients[name])
                            gradients[name] /= dist.get_world_size()
                        else:
                            gradients[name] = safe_get_full_grad(parameter)
                    return step(*args, **options)

                engine.step = recorded
            train_step(batches)

        run.train_step, run.metrics.record = recording_step, recording

    results = []
    for zero_stage in range(4):
        expected.clear()
        config = f"--deepspeed_config=ds_configs/zero{zero_stage}.json"
        options = ("--stages=1:3,2:12", "--optimizer.clip=0", "--eval_after_growth=7", "--tracking=none", "--lr=0.01")
        run_dir = Path(folder) / f"run-{zero_stage}"
        pretrain(
            parse_run([*small_options(Path(folder)), config, *options, f"--output_dir={run_dir}"]), on_built=prepare
        )
        results.append(list(expected))
    return results


@pytest.mark.distributed
def test_observations_are_those_of_whole_tensors(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    for zero_stage, expected in enumerate(run_ranks(2, runs, str(tmp_path))[0]):
        check_files(tmp_path / f"run-{zero_stage}")
        (growth,) = json.loads((tmp_path / f"run-{zero_stage}" / "summary.json").read_text())["growths"]
        found = growth["observations"]
        assert [observation.pop("steps_since") for observation in found] == [1, 2, 5, 10]
        for observation, reference in zip(found, expected, strict=True):
            assert observation.keys() == reference.keys()
            for field, values in reference.items():
                assert observation[field] == pytest.approx(values, rel=1e-4), (zero_stage, field)
        cosines = [observation["copy_cosine_exp_avg"]["1"] for observation in found]
        assert cosines == sorted(cosines, reverse=True) and cosines[-1] < 0.995  # copies part


def check_files(run_dir: Path) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (growth,) = json.loads((run_dir / "summary.json").read_text())["growths"]
    later = [line["eval_loss"] for line in records if line["kind"] == "eval" and line["step"] == 3 + 7]
    assert later == [growth["eval_loss_later"]]
    logged = [line for line in records if line["kind"] == "after_growth"]
    assert [{key: line[key] for key in seen} for line, seen in zip(logged, growth["observations"], strict=True)] == (
        growth["observations"]
    )
    assert (run_dir / "report" / "growths.png").stat().st_size > 10_000
