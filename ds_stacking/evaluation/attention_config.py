"""The configuration of an analysis of attention maps."""

from __future__ import annotations

from dataclasses import dataclass

from ds_stacking.common.errors import UserError


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
    """Tokens of a block, [CLS] and [SEP] included; 0: that of the run, for a model 128."""
    blocks: int = 64
    """Blocks of text that everything is averaged over."""
    neighbours: int = 2
    """Largest distance at which a token counts as a neighbour."""

    def __post_init__(self) -> None:
        if self.sequence_length and self.sequence_length < 8:
            raise UserError(f"sequence_length is {self.sequence_length}; it must be 8 or more.")
        if self.blocks < 1:
            raise UserError(f"blocks is {self.blocks}; it must be 1 or more.")
        if self.neighbours < 1:
            raise UserError(f"neighbours is {self.neighbours}; it must be 1 or more.")
