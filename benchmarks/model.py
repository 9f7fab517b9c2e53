"""Forward and backward on the CPU: our Bert beside transformers' BertForMaskedLM, same weights, same process.

python benchmarks/model.py

Prints one JSON line: per depth the tokens/s of both (medians over interleaved runs) and their ratio. One thread, fp32,
SDPA attention on both sides; theirs gets -100 as the label of the tokens that are not masked, as its users do.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import BertForMaskedLM

from ds_stacking.config import ModelConfig
from ds_stacking.models.bert import Bert
from ds_stacking.models.convert import to_huggingface

SEQUENCES, LENGTH, MASKING_RATE = 32, 64, 0.15


def our_step(model: Bert, input_ids: torch.Tensor, masked: torch.Tensor, labels: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids, masked_positions=masked, labels=labels).loss_sum / len(masked)
    loss.backward()
    return loss.item()


def their_step(model: BertForMaskedLM, input_ids: torch.Tensor, labels: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=input_ids, labels=labels).loss
    loss.backward()
    return loss.item()


def seconds(steps: list[Callable[[], float]], repeats: int) -> list[float]:
    """Median seconds of each step, run in turn so that a change of the machine's speed meets all of them."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 2):
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step()
            if repeat >= 2:  # the first runs warm up
                times[index].append(time.perf_counter() - start)
    return [statistics.median(values) for values in times]


def compare(config: ModelConfig, num_layers: int, repeats: int) -> dict[str, float]:
    """Time both models on one batch, after checking without dropout that they compute the same loss."""
    torch.manual_seed(0)
    ours = Bert(config, num_layers)
    hf_config, state = to_huggingface(ours.named_parameters(), config, num_layers)
    theirs = BertForMaskedLM._from_config(hf_config, attn_implementation="sdpa")
    theirs.load_state_dict(state, strict=False)
    input_ids = torch.randint(1, config.vocab_size, (SEQUENCES, LENGTH))
    masked = torch.randperm(input_ids.numel())[: round(MASKING_RATE * input_ids.numel())].sort().values
    labels = torch.full_like(input_ids, -100)
    labels.view(-1)[masked] = input_ids.view(-1)[masked]
    steps = [
        lambda: our_step(ours, input_ids, masked, input_ids.view(-1)[masked]),
        lambda: their_step(theirs, input_ids, labels),
    ]
    ours.eval(), theirs.eval()
    assert abs(steps[0]() - steps[1]()) < 1e-4
    ours.train(), theirs.train()
    our_seconds, their_seconds = seconds(steps, repeats)
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=4096, norm="post", dropout=options.dropout, attention_dropout=options.dropout, max_positions=LENGTH
    )
    result = {
        "benchmark": "model",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "sequences": SEQUENCES,
        "length": LENGTH,
        "dropout": options.dropout,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "layers": {str(layers): compare(config, layers, options.repeats) for layers in options.layers},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
