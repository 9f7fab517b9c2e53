"""The options of prepare_data.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_stacking.common.errors import require
from ds_stacking.config import PreparationOptions, SourceConfig, require_text

SHARD_TOKENS = 2**27


@dataclass(frozen=True, kw_only=True)
class PreparationConfig(PreparationOptions):
    """One corpus prepared for any number of runs."""

    data: str = ""
    """Text: `docs` (documentation of the installed Python packages), a folder, file or glob, or a hub dataset. Needed,
    but for verify."""
    output_dir: str
    """Folder of the prepared data."""
    tokenizer: str = "train"
    """`train` (WordPiece on the corpus), a folder with a tokenizer, or a hub name."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens of a shard."""
    verify: bool = False
    """Make nothing; compare every byte of the finished folder output_dir with its hash."""
    corpus: SourceConfig = field(default_factory=SourceConfig)
    """How the source is read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.verify or self.data, "--data is missing; give it.")
        for name in ("output_dir", "tokenizer") if self.verify else ("data", "output_dir", "tokenizer"):
            require_text(f"--{name}", getattr(self, name))
        require(
            0 < self.shard_tokens < 2**31, f"shard_tokens is {self.shard_tokens}; it must lie between 1 and 2**31 - 1."
        )
