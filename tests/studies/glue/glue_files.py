"""GLUE in miniature: all tasks as TSV files in GLUE's own layouts, with one rule to learn, and a tiny encoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from ds_stacking.data.tokenizer import train_tokenizer

WORDS = [
    "the",
    "a",
    "film",
    "story",
    "actor",
    "scene",
    "plot",
    "music",
    "light",
    "river",
    "house",
    "road",
    "garden",
    "winter",
]
GOOD, BAD = ["wonderful", "brilliant"], ["dreadful", "boring"]

LAYOUTS: dict[str, tuple[str | None, str, str]] = {
    # task: header of train and dev, their line, header of test ({i} index, {a} {b} sentences, {y} label)
    "CoLA": (None, "gj04\t{y}\t\t{a}", "index\tsentence"),
    "SST-2": ("sentence\tlabel", "{a}\t{y}", "index\tsentence"),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{y}\t7{i}\t8{i}\t{a}\t{b}",
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    ),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore",
        "{i}\tnews\t{a}\t{b}\t{y}",
        "index\tgenre\tsentence1\tsentence2",
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{i}\t1\t2\t{a}\t{b}\t{y}",
        "id\tquestion1\tquestion2",
    ),
    "MNLI": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "{i}\tfiction\t{a}\t{b}\t{y}\t{y}",
        "index\tgenre\tsentence1\tsentence2",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "{i}\t{a}\t{b}\t{y}", "index\tquestion\tsentence"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "{i}\t{a}\t{b}\t{y}", "index\tsentence1\tsentence2"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "{i}\t{a}\t{b}\t{y}", "index\tsentence1\tsentence2"),
}
LABELS = {
    "MNLI": ("contradiction", "entailment"),
    "QNLI": ("not_entailment", "entailment"),
    "RTE": ("not_entailment", "entailment"),
    "STS-B": ("0.500", "4.500"),
}


def sentence(chooser: random.Random, good: bool) -> str:
    """Six words, one of which tells the label; quotes are part of GLUE's texts."""
    words = chooser.choices(WORDS, k=5)
    words.insert(chooser.randrange(6), chooser.choice(GOOD if good else BAD))
    return '" ' + " ".join(words)


def write_task(root: Path, task: str, *, train: int = 64, dev: int = 24, test: int = 5) -> Path:
    """One task's folder; the label depends on the first sentence."""
    header, line, test_header = LAYOUTS[task]
    folder = root / task
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(task)
    names = ["train", "dev_matched", "dev_mismatched"] if task == "MNLI" else ["train", "dev"]
    for name in names:
        rows = [] if header is None else [header]
        for i in range(train if name == "train" else dev):
            good = chooser.random() < 0.5
            label = LABELS.get(task, ("0", "1"))[good]
            rows.append(line.format(i=i, a=sentence(chooser, good), b=sentence(chooser, True), y=label))
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    for name in ["test_matched", "test_mismatched"] if task == "MNLI" else ["test"]:
        write_test(folder / f"{name}.tsv", test_header, chooser, test)
    if task == "MNLI":
        (root / "diagnostic").mkdir(exist_ok=True)
        write_test(root / "diagnostic" / "diagnostic.tsv", "index\tsentence1\tsentence2", chooser, test)
    return folder


def write_test(path: Path, header: str, chooser: random.Random, rows: int) -> None:
    columns = header.split("\t")
    lines = [header]
    for i in range(rows):
        fields = [
            str(10 + i) if column in ("index", "id") else sentence(chooser, i % 2 == 0) if "ent" in column else "x"
            for column in columns
        ]
        lines.append("\t".join(fields))
    path.write_text("\n".join(lines) + "\n")


def write_encoder(folder: Path, *, layers: int = 1, seed: int = 0, words: Sequence[str] = ()) -> Path:
    """A tiny BERT with random weights and a tokenizer that knows all words."""
    tokenizer = train_tokenizer([" ".join([*WORDS, *GOOD, *BAD, *words])] * 3, 300, True)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
