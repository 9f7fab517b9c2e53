"""python benchmarks/data.py - data on one core: masked batches and tokenising, beside transformers and tokenizers.

Peers run in the same process, in turns; speeds are ratios of medians of CPU time. The Hugging Face way reads sequences
from a `datasets` table and masks them with DataCollatorForLanguageModeling; ours draws their order, reads and masks
them. `--index_documents 100000000` opens a prepared folder of so many synthetic documents instead. Prints
JSON lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from ds_stacking.common.files import write_json
from ds_stacking.data.batches import MaskedBatches
from ds_stacking.data.manifests import SPLITS
from ds_stacking.data.masking import Masker, Unit
from ds_stacking.data.preparation import worker
from ds_stacking.data.sources.corpus import RawDocument
from ds_stacking.data.sources.documentation import documentation
from ds_stacking.data.token_file import Split, TokenFile
from ds_stacking.data.tokenizer import SPECIAL_TOKENS, special_ids, text_encoder, train_tokenizer

VOCAB_SIZE = 30_522
STREAM_TOKENS = 8_000_000
SENTENCE_TOKENS = 23
TEXT_CHARACTERS = 2_000_000
CASES: list[tuple[str, int, bool, Unit]] = [
    ("plain sequences", 1, False, "token"),
    ("plain sequences, 35 shards", 35, False, "token"),
    ("sentence pairs", 1, True, "token"),
    ("sentence pairs, 35 shards", 35, True, "token"),
    ("whole words", 1, False, "word"),
    ("spans", 1, False, "span"),
]
"""Name, shards, sentence pairs, masking; 35 shards are the paper's 3.4 G words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--index_documents", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.index_documents:
        print(json.dumps(index(options.index_documents)))
        return
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *(f"w{i}" for i in range(5, VOCAB_SIZE))])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, STREAM_TOKENS).astype(np.uint16)
    peer = hugging_face(tokens, tokenizer, options)
    for case in CASES:
        print(json.dumps(compare(case, tokens, tokenizer, peer, options)), flush=True)
    print(json.dumps(tokenising(options)))


def compare(
    case: tuple[str, int, bool, Unit],
    tokens: np.ndarray,
    tokenizer: BertTokenizer,
    peer: Callable[[np.ndarray], int],
    options: argparse.Namespace,
) -> dict[str, object]:
    """Median speeds of our case and of the peer's plain sequences in masked tokens per second, and their ratio."""
    name, shards, pairs, unit = case
    special = special_ids(tokenizer)
    batches = MaskedBatches(
        split(tokens, shards, sentences=pairs),
        sequence_length=options.sequence_length,
        masking_rate=0.15,
        masker=Masker(special=special, vocab_size=VOCAB_SIZE, unit=unit, continues=np.arange(VOCAB_SIZE) % 4 == 3),
        special=special,
        seed=1,
        next_sentence=pairs,
    )
    ours, theirs = interleave(lambda samples: len(batches.batch(samples).labels), peer, options)
    return {
        "benchmark": f"masked tokens per second on one core: {name}",
        "sequence_length": options.sequence_length,
        "ours": round(ours),
        "datasets and DataCollatorForLanguageModeling": round(theirs),
        "ratio": round(ours / theirs, 1),
    }


def split(tokens: np.ndarray, shards: int, sentences: bool) -> Split:
    """The stream in so many shards, a sentence beginning every 23 tokens."""
    files = []
    for part in np.array_split(tokens, shards):
        starts = np.arange(0, len(part), SENTENCE_TOKENS, dtype=np.uint32) if sentences else None
        files.append(TokenFile(tokens=part, offsets=np.array([0, len(part)]), sentences=starts))
    return Split(files=files)


def hugging_face(
    tokens: np.ndarray, tokenizer: BertTokenizer, options: argparse.Namespace
) -> Callable[[np.ndarray], int]:
    """Batches from a `datasets` table of sequences, masked by the collator; returns how many tokens were masked."""
    places = options.sequence_length - 2
    rows = tokens[: len(tokens) // places * places].reshape(-1, places)[:20_000].astype(np.int32)
    ends = np.full((len(rows), 1), 0, np.int32)
    sequences = np.concatenate((ends + tokenizer.cls_token_id, rows, ends + tokenizer.sep_token_id), axis=1)
    flags = np.zeros_like(sequences, np.int8)
    flags[:, [0, -1]] = 1
    table = datasets.Dataset.from_dict({"input_ids": list(sequences), "special_tokens_mask": list(flags)})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    order = np.random.default_rng(1).permutation(len(table))

    def batch(samples: np.ndarray) -> int:
        columns = table[order[samples % len(order)]]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return int((collator(examples)["labels"] != -100).sum())

    return batch


def interleave(
    ours: Callable[[np.ndarray], int], theirs: Callable[[np.ndarray], int], options: argparse.Namespace
) -> tuple[float, float]:
    """Items per second of two functions that return how many they made, run in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    made = [0, 0]
    for step in range(-2, options.repeats):  # the first two warm up
        samples = np.arange(options.batch_size) + (step + 2) * options.batch_size
        for i, function in enumerate((ours, theirs)):
            begin = time.process_time()
            count = function(samples)
            if step >= 0:
                seconds[i].append(time.process_time() - begin)
                made[i] += count
    first, second = (made[i] / options.repeats / statistics.median(seconds[i]) for i in (0, 1))
    return first, second


def tokenising(options: argparse.Namespace) -> dict[str, object]:
    """What a worker of prepare_data.py does, cleaning and hashing included, beside `tokenizers` on the same texts."""
    texts: list[str] = []
    for text in documentation():
        texts.append(text)
        if sum(map(len, texts)) > TEXT_CHARACTERS:
            break
    tokenizer = train_tokenizer(texts, 8192, True)
    setting = worker.WorkerConfig(
        tokenizer=text_encoder(tokenizer).to_str(),
        sep=special_ids(tokenizer).sep,
        dtype="uint16",
        eval_percent=5.0,
        sentences=False,
        near_duplicates=False,
    )
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=worker.start, initargs=(setting,)) as pool:
        speeds = pool.apply(tokenising_in_worker, (texts, setting.tokenizer, max(3, options.repeats // 10)))
    return {
        "benchmark": "tokens per second on one core: tokenising",
        "ours": round(speeds[0]),
        "tokenizers": round(speeds[1]),
        "ratio": round(speeds[0] / speeds[1], 3),
    }


def tokenising_in_worker(texts: list[str], tokenizer: str, repeats: int) -> tuple[float, float]:
    """Tokens per second of a worker and of `tokenizers` alone."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer)
    documents = [RawDocument(text) for text in texts]
    return interleave(
        lambda _: len(worker.tokenise(documents).tokens) - len(documents),
        lambda _: sum(map(len, encoder.encode_batch_fast(texts, add_special_tokens=False))),
        argparse.Namespace(repeats=repeats, batch_size=1),
    )


def index(documents: int) -> dict[str, Any]:
    """Open a folder of so many documents of 8 tokens and read batches from it: seconds, and memory of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = {"tokens": documents * 8, "documents": documents}
        manifest: Any = {"dtype": "uint16", "vocab_size": VOCAB_SIZE} | {part: facts for part in SPLITS}
        write_json(folder / "manifest.json", manifest)
        with (folder / "train.bin").open("wb") as file:
            file.truncate(documents * 16)  # a file of zeros that takes no room
        offsets = np.lib.format.open_memmap(folder / "train_offsets.npy", "w+", np.int64, (documents + 1,))
        for begin in range(0, documents + 1, 10**6):
            offsets[begin : begin + 10**6] = np.arange(begin, min(begin + 10**6, documents + 1)) * 8
        del offsets
        process = psutil.Process()
        before, begin = process.memory_info(), time.perf_counter()
        opened = Split(files=[TokenFile.open(folder, "train", manifest)])
        special = special_ids(BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL_TOKENS)}))
        batches = MaskedBatches(
            opened,
            sequence_length=128,
            masking_rate=0.15,
            masker=Masker(special=special, vocab_size=VOCAB_SIZE),
            special=special,
            seed=1,
            separate_documents=True,
        )
        batches.batch(np.arange(10**9, 10**9 + 256))
        first = time.perf_counter() - begin
        for step in range(100):
            batches.batch(np.arange(256) + step * 256)
        after = process.memory_info()
    return {
        "benchmark": "an index of documents",
        "documents": documents,
        "seconds to open and read a batch": round(first, 3),
        "MB resident, mapped pages included": round((after.rss - before.rss) / 1e6),
        "MB resident, own": round(((after.rss - after.shared) - (before.rss - before.shared)) / 1e6),
    }


if __name__ == "__main__":
    main()
