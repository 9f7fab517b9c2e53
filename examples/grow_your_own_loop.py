"""A model of Hugging Face, grown from 2 to 4 layers in the middle of a DeepSpeed training loop of your own.

deepspeed --num_gpus 2 examples/grow_your_own_loop.py
python examples/grow_your_own_loop.py

On a CPU DeepSpeed compiles an extension at the first start, which takes a minute or two.

Put your model, data and loop in the place of these; `build_engine` and `grow_engine` are all that a growth needs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_stacking.engine.grow import grow_engine

VOCABULARY, LENGTH, BATCH = 256, 32, 8
DS_CONFIG = {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": {"stage": 2}, "steps_per_print": 2**31}


def build_engine(layers: int, groups: Callable = lambda model: model.parameters()) -> deepspeed.DeepSpeedEngine:
    """An engine as you make one already; which parameters share a group is left to `groups`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))
    optimizer = torch.optim.AdamW(groups(model), lr=2e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=DS_CONFIG)[0]


def make_batches() -> Iterator[torch.Tensor]:
    """Endless tokens, others on each rank: sequences in which every token follows from the one before."""
    generator = torch.Generator().manual_seed(deepspeed.comm.get_rank())
    after = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    while True:
        rows = [torch.randint(VOCABULARY, (BATCH,), generator=generator)]
        for _ in range(LENGTH - 1):
            rows.append(after[rows[-1]])
        yield torch.stack(rows, dim=1)  # [B, T]


def train(engine: deepspeed.DeepSpeedEngine, batches: Iterator[torch.Tensor], steps: int) -> list[float]:
    """Your training loop. Returns the losses of this rank."""
    losses = []
    for _ in range(steps):
        tokens = next(batches).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main() -> tuple[list[float], list[float], int]:
    """Train 2 layers, grow, train 4 layers. Returns the losses of both and the number of layers."""
    engine = build_engine(2)
    batches = make_batches()
    before = train(engine, batches, 20)
    engine, record = grow_engine(engine, build_engine, 4, operator="interleave+zero_output")
    after = train(engine, batches, 20)
    layers = len(engine.module.model.layers)
    if deepspeed.comm.get_rank() == 0:
        print(f"2 layers: loss {before[0]:.3f} -> {before[-1]:.3f}")
        print(f"grown in {record.seconds:.2f} s, {record.tensors_verified} tensors verified")
        print(f"{layers} layers: loss {after[0]:.3f} -> {after[-1]:.3f}")
    return before, after, layers


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", help="given by the deepspeed launcher")
    parser.parse_args()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    for name, value in alone.items():  # what a launcher sets
        os.environ.setdefault(name, value)
    deepspeed.init_distributed()
    main()
    deepspeed.comm.destroy_process_group()
