"""A small corpus made of sentences from a grammar: the same on every machine, and with something to learn."""

from __future__ import annotations

import random
from pathlib import Path

SUBJECTS = ["the cat", "a small dog", "my old teacher", "the tired sailor", "her brother", "the grey horse"]
VERBS = ["sees", "follows", "carries", "paints", "remembers", "finds"]
OBJECTS = ["a red ball", "the long river", "two green apples", "an open window", "the last letter", "a silver coin"]
ENDS = ["in the morning", "near the harbour", "after the rain", "without a word", "before winter", "on the hill"]


def write_corpus(folder: Path, documents: int = 240) -> Path:
    """Write `documents` documents of ten sentences into one text file; returns the folder."""
    chooser = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        "\n".join(
            " ".join(chooser.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, ENDS)).capitalize() + "."
            for _ in range(10)
        )
        for _ in range(documents)
    ]
    (folder / "corpus.txt").write_text("\n\n".join(texts) + "\n")
    return folder


def small_options(folder: Path) -> list[str]:
    """Options of pretrain.py for a run of seconds on `folder`/corpus, its cache and its run inside `folder`."""
    return [
        f"--data={folder / 'corpus'}",
        f"--corpus.cache_dir={folder / 'cache'}",
        f"--output_dir={folder / 'run'}",
        "--corpus.vocab_size=200",
        "--corpus.sequence_length=32",
        "--corpus.eval_percent=10",
        "--corpus.max_leak=100",  # few words, so the same sentences everywhere
        "--model.hidden_size=32",
        "--model.initializer_range=0.02",
        "--model.dropout=0.1",
        "--model.attention_dropout=0.1",
        "--model.max_positions=32",
        "--tokens_per_step=512",
        "--eval_sequences=24",
        "--eval_every=5",
        "--log_every=1",
        "--warmup_steps=4",
        "--precision=fp32",
        "--stages=1:8,2:8,4:8",
    ]
