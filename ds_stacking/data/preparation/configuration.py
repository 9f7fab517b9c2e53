"""The configuration of preparing a corpus once for any number of runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_stacking.common.errors import require
from ds_stacking.config import SourceConfig, require_text

MOST_WORKERS = 1024
"""Processes; each has a copy of the tokenizer and of some documents."""


@dataclass(kw_only=True)
class PreparationConfig:
    """One corpus prepared for any number of runs."""

    data: str = ""
    """Text: `docs` (documentation of the installed Python packages), a folder, file or glob, or a hub dataset. Needed,
    but for verify."""
    output_dir: str
    """Folder of the prepared data."""
    tokenizer: str = "train"
    """`train` (WordPiece on the corpus), a folder with a tokenizer, or a hub name."""
    sentences: bool = False
    """Store where sentences begin, for sentence pairs that meet at a sentence's end (model.next_sentence)."""
    near_duplicates: float = 0.0
    """Jaccard similarity of word 5-grams from which a document is dropped as a near duplicate; 0: equal ones only."""
    max_leak: float = 1.0
    """Largest share, in percent, of held-out 13-grams that may stand in the training split too."""
    shard_tokens: int = 2**27
    """Tokens of a shard."""
    workers: int = 0
    """Processes that clean and tokenise; 0 means one per core."""
    verify: bool = False
    """Make nothing; compare every byte of the finished folder output_dir with its hash."""
    corpus: SourceConfig = field(default_factory=SourceConfig)
    """How the source is read."""

    def __post_init__(self) -> None:
        require(self.verify or self.data, "--data is missing; give it.")
        for name in ("output_dir", "tokenizer") if self.verify else ("data", "output_dir", "tokenizer"):
            require_text(f"--{name}", getattr(self, name))
        for name in ("near_duplicates", "max_leak", "workers"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative.")
        require(self.workers <= MOST_WORKERS, f"workers is {self.workers}; it must be {MOST_WORKERS} or less, or 0.")
        require(self.near_duplicates <= 1, f"near_duplicates is {self.near_duplicates}; it must be 1 or less.")
        require(self.max_leak <= 100, f"max_leak is {self.max_leak}; it is in percent, 100 or less.")
        require(
            0 < self.shard_tokens < 2**31, f"shard_tokens is {self.shard_tokens}; it must lie between 1 and 2**31 - 1."
        )
