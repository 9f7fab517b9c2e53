"""python benchmarks/data.py - masked batches per second, ours beside transformers' collator, on one core.

Both mask the same blocks of random tokens in the same process, in turns. The collator gets blocks that were read
beforehand, as lists with their special tokens marked; ours also draws the order of the blocks and reads them. Time is
CPU time of the process. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from ds_stacking.data.batches import MaskedBatches
from ds_stacking.data.masking import Masker
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SPECIAL_TOKENS, special_ids

VOCAB_SIZE = 30_522
STREAM_TOKENS = 8_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)

    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *(f"w{i}" for i in range(5, VOCAB_SIZE))])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(5, VOCAB_SIZE, STREAM_TOKENS).astype(np.uint16).tofile(path)
        tokens = np.memmap(path, np.uint16, "r")
        ours = MaskedBatches(
            Split(files=[TokenFile(tokens=tokens, offsets=np.array([0, len(tokens)]))]),
            sequence_length=options.sequence_length,
            masking_rate=0.15,
            masker=Masker(special=special_ids(tokenizer), vocab_size=VOCAB_SIZE),
            special=special_ids(tokenizer),
            seed=1,
        )
        print(json.dumps(compare(ours, tokenizer, options)))


def compare(ours: MaskedBatches, tokenizer: BertTokenizer, options: argparse.Namespace) -> dict[str, object]:
    """Return median speeds of both in masked tokens per second, and their ratio."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    seconds: dict[str, list[float]] = {"ours": [], "collator": []}
    masked: dict[str, int] = {"ours": 0, "collator": 0}
    for step in range(-2, options.repeats):  # the first two warm up
        samples = np.arange(options.batch_size) + (step + 2) * options.batch_size
        examples = as_examples(ours, samples)
        ours_seconds, batch = timed(ours.batch, samples)
        peer_seconds, collated = timed(collator, examples)
        if step >= 0:
            seconds["ours"].append(ours_seconds)
            seconds["collator"].append(peer_seconds)
            masked["ours"] += len(batch.labels)
            masked["collator"] += int((collated["labels"] != -100).sum())
    speed = {name: masked[name] / options.repeats / statistics.median(seconds[name]) for name in seconds}
    return {
        "benchmark": "masked tokens per second on one core",
        **vars(options),
        "ours": round(speed["ours"]),
        "DataCollatorForLanguageModeling": round(speed["collator"]),
        "ratio": round(speed["ours"] / speed["collator"], 2),
    }


def as_examples(ours: MaskedBatches, samples: np.ndarray) -> list[dict[str, list[int]]]:
    """Return the unmasked blocks of the samples in the form that the collator takes."""
    batch = ours.batch(samples)
    batch.input_ids.view(-1)[batch.masked_positions] = batch.labels
    return [{"input_ids": row, "special_tokens_mask": [int(i < 5) for i in row]} for row in batch.input_ids.tolist()]


def timed(function: Callable[[Any], Any], argument: object) -> tuple[float, Any]:
    """Return the CPU seconds of a call and its result."""
    begin = time.process_time()
    result = function(argument)
    return time.process_time() - begin, result


if __name__ == "__main__":
    main()
