"""The configuration of an analysis of attention maps."""

from __future__ import annotations

from dataclasses import dataclass

from ds_stacking.common.errors import UserError

MOST = 1_000_000
"""Sequences, tokens of a sequence and distances beyond all use."""


@dataclass(kw_only=True)
class AttentionConfig:
    """What attention maps are computed of, and on which text."""

    model: str
    """A run directory, whose stages are all analysed, or a folder or hub name with a Hugging Face encoder."""
    tokenizer: str | None = None
    """A folder or hub name with its tokenizer; default: that of the model."""
    data: str | None = None
    """Text, as for pretrain.py; default: that of the run, for a model docs."""
    output_dir: str | None = None
    """Numbers and figures; default: report/attention in the run directory, for a model runs/attention."""
    sequence_length: int = 0
    """Tokens of a sequence, [CLS] and [SEP] included; 0: that of the run, for a model 128."""
    sequences: int = 64
    """Sequences of text that everything is averaged over."""
    neighbours: int = 2
    """Largest distance at which a token counts as a neighbour."""

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "data", "output_dir"):
            text = getattr(self, name)
            if text is not None and (not text.strip() or "\0" in text):
                raise UserError(f"{name} is {text!r}; it must name something, or be left out.")
        least = {"sequence_length": 8, "sequences": 1, "neighbours": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not smallest <= value <= MOST and not (name == "sequence_length" and value == 0):
                raise UserError(f"{name} is {value:.6g}; it must be {smallest} to {MOST:,}.")
