"""Fine-tuning one model on one task of GLUE, in a DeepSpeed engine of this process alone.

Recipe of Gong et al. 2019 (reproduce_glue.sh): AdamW with weight decay 0.01 on every parameter, no clipping, learning
rate up over the first tenth of the steps and down to 0 on a line. Shapes: B examples, T tokens of the longest of them,
C classes, N examples of a split.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from ds_stacking.common.errors import UserError
from ds_stacking.common.own_files import refuse_links
from ds_stacking.common.words import plain, shown
from ds_stacking.config import OptimizerConfig
from ds_stacking.data.tokenizer import count_vocabulary, load_tokenizer
from ds_stacking.engine.factory import Engine, EngineFactory, EngineSpec, device
from ds_stacking.engine.release import collect, release
from ds_stacking.engine.stepping import step_if_finite
from ds_stacking.models.encoders import load_config, load_model, quiet
from ds_stacking.studies.glue.configuration import Job
from ds_stacking.studies.glue.metrics import evaluate
from ds_stacking.studies.glue.task_data import Examples, TaskData
from ds_stacking.studies.glue.tasks import TASKS, Task

OPTIMIZER = OptimizerConfig(betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, decay_all=True, clip=0.0)
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout"),
    *("classifier_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout"),
)
"""Names that configurations of encoders have for rates of dropout."""
EVAL_BATCH = 64
SHORTEST = 8
"""Tokens of an input, at least."""
CHECK_EVERY = 100
"""Steps between looks at the loss: reading it waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The model that is fine-tuned and its tokenizer."""

    source: str
    """Folder or hub name."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    max_length: int
    """Longest input in tokens."""
    dropout: float | None = None
    """Dropout in place of that of the model's configuration."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fine-tuning gave."""

    scores: dict[str, dict[str, float]]
    """Development set -> metric -> percent."""
    predictions: dict[str, list[float]]
    """Test set -> number of the class, or score, of every row."""
    train_loss: float | None = None
    """Mean loss of the last pass over the training set; None of a baseline."""
    test_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Test set with labels -> metric -> percent."""


def load_encoder(source: str, tokenizer: str | None, max_length: int, dropout: float | None = None) -> Encoder:
    """Check model, weights and tokenizer before anything is trained or written; of a run directory, its last stage.

    Raises UserError where one of them is missing or damaged, or they disagree.
    """
    quiet()
    source = exported(source)
    try:
        config = with_dropout(load_config(source), dropout)
        loaded = load_tokenizer(tokenizer or source)
        check_vocabulary(tokenizer or source, count_vocabulary(loaded), config)
        positions = getattr(config, "max_position_embeddings", None) or max_length
        shortest = min(max_length, int(positions), int(loaded.model_max_length))
        encoder = Encoder(source=source, tokenizer=loaded, max_length=shortest, dropout=dropout)
        if shortest < SHORTEST:
            raise UserError(f"{source} takes inputs of {shortest} tokens only; give --model another.")
        build_classifier(encoder, 2, untrained=False)
    except UserError:
        raise
    except Exception as error:  # damaged files, each with a class of its own
        raise UserError(
            f"{shown(source)} holds no model that can be used ({_words(error)}); give --model another."
        ) from None
    return encoder


def exported(source: str) -> str:
    """The folder of a run directory's last stage; any other source as it is.

    Raises UserError for a file, for a run that has exported nothing, and for links out of a run directory, which may
    come from somebody else.
    """
    folder, final = Path(source), Path(source) / "export" / "final"
    if os.path.lexists(source) and not os.path.isdir(source):
        raise UserError(f"--model {shown(source)} is a file; give the folder that holds config.json and the weights.")
    if not os.path.lexists(source) and not re.fullmatch(r"[\w./~-]{1,1000}", source):
        raise UserError(f"--model {shown(source)} is no folder that is there and no name on the hub; give one.")
    if not os.path.lexists(folder / "export") and not os.path.lexists(folder / "metrics.jsonl"):
        return source
    if not final.is_dir():
        raise UserError(f"--model {shown(source)} is a run that has exported no model yet; wait for its end.")
    if not final.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{final} leads out of the run directory, to {final.resolve()}; give --model that folder itself."
        )
    refuse_links(final, tuple(os.listdir(final)))
    return str(final)


def _words(error: Exception) -> str:
    return plain(f"{type(error).__name__}: {error}", 200)


def with_dropout(config: PreTrainedConfig, dropout: float | None) -> PreTrainedConfig:
    """Set every rate of dropout that the configuration has. Raises UserError where it has none that is known."""
    names = [name for name in DROPOUTS if hasattr(config, name)]
    if dropout is None:
        return config
    if not names:
        raise UserError(f"No rate of dropout is known in a {config.model_type} configuration; leave --dropout out.")
    for name in names:
        setattr(config, name, dropout)
    return config


def check_vocabulary(tokenizer: str, size: int, config: PreTrainedConfig) -> None:
    """Raise UserError where a tokenizer has ids that the model's embedding has no row for."""
    rows = getattr(config, "vocab_size", size)
    if size > rows:
        raise UserError(
            f"The tokenizer of {tokenizer} has {size} entries, the model {rows}; give the model's own --tokenizer."
        )


def build_classifier(encoder: Encoder, classes: int, *, untrained: bool) -> nn.Module:
    """The encoder with a fresh head of `classes` outputs, by the current random state.

    `untrained` makes every weight fresh. Raises UserError where weights of the encoder itself are missing.
    """
    config = with_dropout(load_config(encoder.source, num_labels=classes), encoder.dropout)
    if untrained:
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return load_model(AutoModelForSequenceClassification, encoder.source, config=config)


def finetune(job: Job, data: TaskData, encoder: Encoder, ds_config: Mapping[str, Any], *, bf16: bool) -> Outcome:
    """Train one job to its end and evaluate it once, at the end. Raises RuntimeError where the loss is not finite."""
    task = TASKS[job.task]
    torch.manual_seed(job.seed)
    model = build_classifier(encoder, len(task.labels) or 1, untrained=job.arm == "untrained")
    factory = EngineFactory(build_model=lambda *_: model, ds_config=ds_config, optimizer=OPTIMIZER, bf16=bf16)
    engine = factory.build(EngineSpec(layers=0, micro_batch_size=job.batch_size))
    try:
        train_loss = _train(engine, job, task, data.train, encoder)
        scores = {}
        for name, split in data.dev.items():
            scores[name] = evaluate(task.metrics, split.labels, predict(engine, task, split, encoder))
        answers = {
            name: predict(engine, task, split, encoder)
            for name, split in data.test.items()
            if job.arm == "model" or split.labels
        }
    finally:
        release(engine)
        collect()
    test_scores = {
        name: evaluate(task.metrics, split.labels, answers[name]) for name, split in data.test.items() if split.labels
    }
    predictions = {name: answer.tolist() for name, answer in answers.items() if job.arm == "model"}
    return Outcome(scores=scores, predictions=predictions, train_loss=train_loss, test_scores=test_scores)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up over the first tenth of `steps`, then on a line to 0; steps count from 0."""
    warmup = round(WARMUP * steps)
    return peak * ((step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup))


def _train(engine: Engine, job: Job, task: Task, train: Examples, encoder: Encoder) -> float:
    steps = job.epochs * math.ceil(len(train) / job.batch_size)
    lengths = _lengths(train)
    losses = torch.zeros((), device=device())
    step = seen = 0
    engine.train()
    for epoch in range(job.epochs):
        losses.zero_()
        seen = 0
        for rows, swapped in epoch_batches(job, task, lengths, epoch):
            inputs, labels = collate(train, rows, encoder, swapped)
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, job.lr)
            loss = _loss(engine(**inputs).logits, labels, task)
            engine.backward(loss)
            step_if_finite(engine)
            losses += loss.detach() * len(rows)
            seen += len(rows)
            step += 1
            if (step % CHECK_EVERY == 0 or step == steps) and not torch.isfinite(losses):
                raise RuntimeError(f"the loss is not finite at step {step} of {steps}; try a lower --lr")
    return float(losses) / seen


def epoch_batches(
    job: Job, task: Task, lengths: np.ndarray, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The rows of each batch and, for a symmetric task, which of them change their sentences' places.

    As in the published code, a batch holds examples alike in length, and batches come in random order.
    """
    generator = np.random.default_rng((job.seed, epoch))
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    starts = generator.permutation(range(0, len(order), job.batch_size))
    for start in starts:
        rows = order[start : start + job.batch_size]
        yield rows, generator.random(len(rows)) < 0.5 if task.symmetric else None


def _lengths(split: Examples) -> np.ndarray:
    """Characters of each example [N]."""
    return np.array([sum(map(len, row)) for row in zip(*split.texts, strict=True)])


def collate(
    split: Examples, rows: Sequence[int] | np.ndarray, encoder: Encoder, swapped: np.ndarray | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Model inputs [B, T] of some rows, padded to the longest, and their labels [B]; both on the device."""
    texts = [[column[row] for row in rows] for column in split.texts]
    if swapped is not None:
        first, second = texts
        for i in np.flatnonzero(swapped):
            first[i], second[i] = second[i], first[i]
    inputs = encoder.tokenizer(
        *texts, padding=True, truncation=True, max_length=encoder.max_length, return_tensors="pt"
    )
    labels = torch.tensor([split.labels[row] for row in rows]).to(device()) if split.labels else None
    return {name: tensor.to(device()) for name, tensor in inputs.items()}, labels


def _loss(logits: Tensor, labels: Tensor | None, task: Task) -> Tensor:  # [B, C], [B] -> []
    assert labels is not None, "a training set has labels"
    if task.regression:
        return F.mse_loss(logits.float().squeeze(-1), labels)
    return F.cross_entropy(logits.float(), labels.long())


@torch.no_grad()
def predict(engine: Engine, task: Task, split: Examples, encoder: Encoder) -> np.ndarray:
    """Number of the class, or the score, of every example [N]; dropout is off."""
    engine.eval()
    order = np.argsort(_lengths(split), kind="stable")  # so that little is padding
    predictions = np.zeros(len(split))
    for start in range(0, len(order), EVAL_BATCH):
        rows = order[start : start + EVAL_BATCH]
        inputs, _ = collate(split, rows, encoder)
        logits = engine(**inputs).logits.float().cpu()
        predictions[rows] = (logits.squeeze(-1) if task.regression else logits.argmax(-1)).numpy()
    return predictions if task.regression else predictions.astype(int)
