"""Training steps in a ZeRO engine: our Bert beside transformers' BertForMaskedLM, same weights, same process.

    python benchmarks/throughput.py

Prints one JSON line: per depth the tokens/s of both (medians over interleaved optimizer steps) and their ratio. The
peer uses SDPA attention and -100 as the label of tokens that are not masked, as its users do. On a CPU the size is the
quickstart's and one thread computes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BertForMaskedLM

from ds_stacking.config import ModelConfig, OptimizerConfig
from ds_stacking.engine.factory import EngineFactory, EngineSpec, device, init_distributed
from ds_stacking.engine.host import keep_freed_memory
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import to_huggingface

MASKING_RATE = 0.15


def build(make_model: Callable[[int, bool], nn.Module], layers: int, options: argparse.Namespace) -> Any:
    """The engine of one side."""
    factory = EngineFactory(
        build_model=make_model,
        ds_config={"zero_optimization": {"stage": options.zero_stage}},
        optimizer=OptimizerConfig(),
        bf16=options.bf16,
    )
    engine = factory.build(EngineSpec(layers=layers, micro_batch_size=options.sequences))
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-4
    return engine


def our_step(engine: Any, input_ids: Tensor, masked: Tensor, labels: Tensor) -> Tensor:
    loss = engine(input_ids, masked_positions=masked, labels=labels).loss_sum / len(masked)
    engine.backward(loss)
    engine.step()
    return loss.detach()


def their_step(engine: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    loss = engine(input_ids=input_ids, labels=labels).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def seconds(steps: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Median seconds of each step, run in turn so that a change of the machine's speed meets all of them."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 2):
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step().item()  # the host waits for the device here
            if repeat >= 2:  # the first runs warm up
                times[index].append(time.perf_counter() - start)
    return [statistics.median(values) for values in times]


def compare(config: ModelConfig, layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Time both engines on one batch, after checking that their first losses agree."""
    torch.manual_seed(0)
    hf_config, state = to_huggingface(Bert(config, layers).named_parameters(), config, layers)

    def ours(layers: int, initialize: bool) -> nn.Module:
        torch.manual_seed(0)
        return Bert(config, layers, initialize=initialize)

    def theirs(layers: int, initialize: bool) -> nn.Module:
        model = BertForMaskedLM._from_config(hf_config, attn_implementation="sdpa")
        model.load_state_dict(state, strict=False)  # the tied decoder has no entry of its own
        return model.train()

    input_ids = torch.randint(1, config.vocab_size, (options.sequences, options.length), device=device())
    masked = (
        torch.randperm(input_ids.numel(), device=device())[: round(MASKING_RATE * input_ids.numel())].sort().values
    )
    labels = torch.full_like(input_ids, -100)
    labels.view(-1)[masked] = input_ids.view(-1)[masked]
    engines = [build(make, layers, options) for make in (ours, theirs)]
    steps = [
        lambda: our_step(engines[0], input_ids, masked, input_ids.view(-1)[masked]),
        lambda: their_step(engines[1], input_ids, labels),
    ]
    if options.dropout == 0:
        first, second = (step().item() for step in steps)
        assert abs(first - second) < 1e-3 * second, (first, second)
    our_seconds, their_seconds = seconds(steps, options.repeats)
    return {
        "ours_tokens_per_second": round(input_ids.numel() / our_seconds),
        "theirs_tokens_per_second": round(input_ids.numel() / their_seconds),
        "ratio": round(their_seconds / our_seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides, as pretrain.py does
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed speaks there; one JSON line is promised
        init_distributed()
        config = ModelConfig(
            hidden_size=options.hidden_size,
            num_heads=options.hidden_size // 64,
            vocab_size=options.vocab_size,
            norm="post",
            dropout=options.dropout,
            attention_dropout=options.dropout,
            max_positions=options.length,
        )
        layers = {str(layers): compare(config, layers, options) for layers in options.layers}
    result = {
        "benchmark": "throughput",
        **vars(options),
        "layers": layers,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if device().type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, 1 thread",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
