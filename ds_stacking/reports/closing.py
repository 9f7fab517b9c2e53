"""The figures that a run ends with, and in words which lines the model has passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_stacking.reports.table import loss

CLOSING = (
    ("eval_loss_masked", "held-out loss on [MASK] positions"),
    ("unigram_cross_entropy", "unigram line: the same of a model that knows word frequencies only"),
    ("cache_loss", "cache line: of one that knows these and which words stand in the sequence"),
    ("eval_loss_shuffled", "sensitivity to order: the model's loss on shuffled sequences"),
)
"""Fields of the summary, in nats, and what they are."""


def verdict(summary: Mapping[str, Any]) -> str:
    """Which lines the model has passed, and what the order of words is worth to it; of an older run nothing."""
    known = [summary.get(name) for name, _ in CLOSING]
    if any(value is None for value in known):
        return ""
    model, unigram, cache, shuffled = (float(value) for value in known if value is not None)
    order = f"Shuffled sequences cost it {loss(shuffled - model)} nats more."
    if shuffled <= model:
        order = "Shuffled sequences cost it nothing: it knows nothing of their order."
    if model >= unigram and model >= cache:
        return f"The model has passed neither line: word frequencies alone predict as well or better. {order}"
    if model >= cache:
        return (
            "The model has passed the unigram line and not the cache line: it knows more than word frequencies, but "
            f"nothing shows that it does more with its context than find words that stand there again. {order}"
        )
    if model >= unigram:  # a weight that fits the training text can do harm on other text
        return (
            f"The model has passed the cache line, which lies above the unigram line here, and not that one. {order}"
        )
    return (
        "The model has passed both lines: it has read its context, which tells it more than frequencies and the words "
        f"that stand there, mixed with one weight, can. {order}"
    )
