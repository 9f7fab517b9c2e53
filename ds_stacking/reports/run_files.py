"""What reports read of a run directory: config.json, summary.json and metrics.jsonl, in the shapes that they expect.

The directory may come from somebody else, and may be of an older version: a field that is there has its type, or one
sentence says where not; one that is not there is left out of the report. No link in it is followed, and however long
metrics.jsonl is, memory holds a bounded number of its records.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, read_json, read_json_lines

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e39, le=1e39)]
"""What a run may measure; of larger ones, differences and squares would not be numbers any more."""
Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e39)]
"""Tokens, FLOPs, seconds: what a run spends."""
Whole = Annotated[int, Field(ge=0, le=2**53)]
"""Steps, layers and other counts."""
Text = Annotated[str, Field(max_length=10_000)]
Block = Annotated[str, Field(pattern="^[0-9]{1,6}$")]
"""The number of a block, as a key."""
ByBlock = dict[Block, Number | None]
MOST = 50_000
"""Records of training, and as many of evaluations, that are kept; of more, every second, fourth, ... is."""
LARGEST_REST = 1 << 26
"""Bytes of all other records, which a run writes at its growths only."""
MEND = "restore it, or delete that line to draw the rest"


class RunName(TypedDict):
    """config.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    name: NotRequired[Text]


class Stage(TypedDict):
    """A stage of summary.json."""

    layers: Whole
    steps: Whole
    tokens: NotRequired[Amount | None]
    seconds: NotRequired[Amount | None]
    flops: NotRequired[Amount | None]
    train_loss_end: NotRequired[Number | None]
    eval_loss_end: NotRequired[Number | None]
    eval_loss_masked_end: NotRequired[Number | None]


class Growth(TypedDict):
    """A growth of summary.json."""

    stage: NotRequired[Whole]
    eval_loss_later: NotRequired[Number | None]


class Summary(TypedDict):
    """summary.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    finished: NotRequired[bool]
    steps: NotRequired[Whole]
    world_size: NotRequired[Whole]
    zero_stage: NotRequired[Whole]
    parameters: NotRequired[Amount | None]
    tokens: NotRequired[Amount | None]
    flops: NotRequired[Amount | None]
    seconds: NotRequired[Amount | None]
    eval_loss_masked: NotRequired[Number | None]
    eval_loss_shuffled: NotRequired[Number | None]
    unigram_cross_entropy: NotRequired[Number | None]
    cache_loss: NotRequired[Number | None]
    stages: NotRequired[Annotated[list[Stage], Field(max_length=1000)]]
    growths: NotRequired[Annotated[list[Growth], Field(max_length=1000)]]


class Record(TypedDict):
    """A line of metrics.jsonl."""

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)  # type: ignore[misc]
    kind: Annotated[str, Field(max_length=100)]
    step: Whole
    stage: NotRequired[Whole]
    layers: NotRequired[Whole]
    tokens: NotRequired[Amount | None]
    flops: NotRequired[Amount | None]
    seconds: NotRequired[Amount | None]
    training_seconds: NotRequired[Amount | None]
    cpu_seconds: NotRequired[Amount | None]
    loss: NotRequired[Number | None]
    lr: NotRequired[Number | None]
    grad_norm: NotRequired[Number | None]
    tokens_per_second: NotRequired[Amount | None]
    flops_per_second: NotRequired[Amount | None]
    mfu: NotRequired[Amount | None]
    eval_loss: NotRequired[Number | None]
    eval_loss_masked: NotRequired[Number | None]
    from_layers: NotRequired[Whole]
    to_layers: NotRequired[Whole]
    operator: NotRequired[Text]
    optimizer_state: NotRequired[Text]
    seconds_growth: NotRequired[Amount | None]
    eval_loss_before: NotRequired[Number | None]
    eval_loss_after: NotRequired[Number | None]
    tensors_verified: NotRequired[Whole]
    steps_since: NotRequired[Whole]
    weight_norm: NotRequired[ByBlock]
    gradient_norm: NotRequired[ByBlock]
    weight_norm_jump: NotRequired[ByBlock]
    gradient_norm_jump: NotRequired[ByBlock]
    copy_cosine_master: NotRequired[ByBlock]
    copy_cosine_exp_avg: NotRequired[ByBlock]
    copy_cosine_exp_avg_sq: NotRequired[ByBlock]
    seconds_by_phase: NotRequired[Annotated[dict[Text, Amount | None], Field(max_length=100)]]
    bytes_moved: NotRequired[Amount | None]


def read_run_name(run_dir: Path) -> str:
    """The run's name; `run` where config.json has none, or is not there. Raises UserError."""
    with suppress(FileNotFoundError):
        config = read_json(
            run_dir / "config.json", RunName, mend="restore it, or delete it", inside=run_dir, limit=1 << 24
        )
        return config.get("name", "run")
    return "run"


def read_summary(run_dir: Path) -> Summary | None:
    """summary.json; None where the run has not finished yet. Raises UserError."""
    with suppress(FileNotFoundError):
        return read_json(
            run_dir / "summary.json", Summary, mend="restore it, or delete it", inside=run_dir, limit=1 << 26
        )
    return None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Event records of a run in order of steps; fields without a value are left out.

    A run that was resumed wrote some steps twice; those after the resume count. Of a very long run, records of
    training and of evaluations are thinned out evenly, and the last of all is kept. Raises UserError where the file
    is missing or holds a line that is no record (an unfinished last line, as a killed run leaves it, is passed over).
    """
    folder = Path(run_dir)
    kept, last, rest = _Thinned(), None, 0
    try:
        for size, found in read_json_lines(folder / "metrics.jsonl", Record, mend=MEND, inside=folder):
            record = {name: value for name, value in found.items() if value is not None}
            if record["kind"] in ("train", "eval"):
                record = {name: value for name, value in record.items() if name == "kind" or not _is_large(value)}
            elif (rest := rest + max(size, 500)) > LARGEST_REST:
                raise UserError(
                    f"{folder / 'metrics.jsonl'} holds more about growths than any run writes; restore it."
                )
            kept.add(record)
            last = record
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{run_dir} has no metrics.jsonl; give the directory of a run that has begun to train."
        ) from None
    except OSError as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error.strerror}); mend that.") from None
    if last is not None and kept.records[-1:] != [last]:
        kept.records.append(last)
    return kept.records


def _is_large(value: object) -> bool:
    return isinstance(value, str | dict)


class _Thinned:
    """Records by rising step, those of training and of evaluations thinned out where there are too many."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.every = {"train": 1, "eval": 1}
        self.seen = {"train": 0, "eval": 0}
        self.held = {"train": 0, "eval": 0}

    def add(self, record: dict[str, Any]) -> None:
        """Take the next line; what an earlier attempt wrote of its step and later ones goes."""
        if self.records and record["step"] < self.records[-1]["step"]:
            while self.records and self.records[-1]["step"] >= record["step"]:
                self._count(self.records.pop(), -1)
        kind = cast(str, record["kind"])
        if kind in self.seen:
            self.seen[kind] += 1
            if (self.seen[kind] - 1) % self.every[kind]:
                return
        self.records.append(record)
        self._count(record, 1)
        if self.held.get(kind, 0) > MOST:
            self._halve(kind)

    def _count(self, record: dict[str, Any], by: int) -> None:
        if record["kind"] in self.held:
            self.held[record["kind"]] += by

    def _halve(self, kind: str) -> None:
        self.every[kind] *= 2
        kept, number = [], 0
        for record in self.records:
            number += record["kind"] == kind
            if record["kind"] != kind or number % 2:
                kept.append(record)
        self.records, self.held[kind] = kept, -(-self.held[kind] // 2)
