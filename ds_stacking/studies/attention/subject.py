"""What an analysis of attention maps is about: the stages of a run, or one model, with every default resolved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError, require
from ds_stacking.common.json_files import KEEP_OTHERS, Count, check_value, read_json, read_json_lines
from ds_stacking.common.model_folder import means_a_folder
from ds_stacking.common.outputs import check_output_folder
from ds_stacking.common.own_files import open_folder, refuse_links
from ds_stacking.config import CorpusConfig
from ds_stacking.studies.attention.configuration import AttentionConfig

LENGTH = 128
"""Tokens of a sequence where no run says how many."""
STAGE = re.compile(r"stage-([0-9]{1,4})-([0-9]{1,4})L")
"""An exported stage: its number and its layers."""
MEND = "restore it, or give one of the run's exported stages"


class Growth(TypedDict):
    """A growth as metrics.jsonl records it."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: Literal["growth"]
    stage: Count
    from_layers: Count
    to_layers: Count
    operator: str
    layer_map: list[Count | None]


class _Run(TypedDict):
    """What is read of a run's config.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    data: str
    corpus: CorpusConfig


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is analysed, with every default resolved."""

    models: dict[str, Path | str]
    """Name -> folder or hub name; of a run its stages, the shallowest first."""
    growths: list[Growth]
    """The growths between them, as the run's metrics.jsonl records them."""
    tokenizer: str
    """Folder or hub name of the tokenizer."""
    data: str
    """Text."""
    corpus: CorpusConfig
    """How the text is read."""
    length: int
    """Tokens of a sequence."""
    output_dir: Path
    """Numbers and figures."""


def resolve(config: AttentionConfig) -> Subject:
    """Complete the configuration from the run directory, where it names one. Raises UserError."""
    root = Path(config.model)
    stages = _stages(root)
    if not stages:
        if (root / "metrics.jsonl").is_file():
            raise UserError(f"{root} is a run without any exported stage; wait for the end of its first stage.")
        return _of_a_model(config)
    refuse_links(root, ("report", "report/attention"))
    run = _read_run(root)
    growths = _between(root, stages, _growths(root))
    return Subject(
        models={name: root / "export" / name for name in stages},
        growths=growths,
        tokenizer=config.tokenizer or str(root / "export" / stages[0]),
        data=config.data or run["data"],
        corpus=run["corpus"],
        length=config.sequence_length or run["corpus"].sequence_length,
        output_dir=check_output_folder(config.output_dir or str(root / "report" / "attention"), "output_dir"),
    )


def _of_a_model(config: AttentionConfig) -> Subject:
    require(
        Path(config.model).is_dir() or not means_a_folder(config.model),
        f"The folder {config.model} does not exist; give --model a folder or a hub name.",
    )
    return Subject(
        models={Path(config.model).name or config.model: config.model},
        growths=[],
        tokenizer=config.tokenizer or config.model,
        data=config.data or "docs",
        corpus=CorpusConfig(),
        length=config.sequence_length or LENGTH,
        output_dir=check_output_folder(config.output_dir or "runs/attention", "output_dir"),
    )


def _stages(root: Path) -> list[str]:
    """Names of the exported stages of a run, the first one first; none where `root` is no run."""
    try:
        with open_folder(root, "export") as export:
            names = [name for name in os.listdir(export) if STAGE.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{root / 'export'} cannot be read ({error.strerror}); give another --model.") from None
    names.sort(key=lambda name: int(name.split("-")[1]))
    for name in names:
        with open_folder(root, "export", name):  # which refuses a link
            pass
    return names


def _read_run(root: Path) -> _Run:
    for name in ("config.json", "metrics.jsonl"):
        if not (root / name).is_file():
            raise UserError(
                f"{root} has exported stages but no {name}; give a whole run directory, or one of its stages."
            )
    return read_json(root / "config.json", _Run, mend=MEND, inside=root)


def _growths(root: Path) -> dict[int, Growth]:
    """The growths of a run so far by the stage that they begin: its events, since summary.json comes at the end."""
    path, found = root / "metrics.jsonl", dict[int, Growth]()
    for number, (_, record) in enumerate(read_json_lines(path, _Event, mend=MEND, inside=root), start=1):
        if record["kind"] == "growth":
            where = f"{path} line {number}"
            growth = check_value(record, Growth, where=where, mend=MEND)
            found[growth["stage"]] = growth  # a resumed run repeats some
    return found


class _Event(TypedDict):
    """A line of metrics.jsonl."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    kind: str


def _between(root: Path, stages: Sequence[str], by_stage: Mapping[int, Growth]) -> list[Growth]:
    """The growths between exported stages, up to the first that is not known (it was made on the disk).

    Raises UserError for one that does not lead from the one to the other.
    """
    found: list[Growth] = []
    for before, after in pairwise(stages):
        (number, deep), shallow = map(int, _parts(after)), int(_parts(before)[1])
        growth = by_stage.get(number - 1)
        if growth is None:
            break
        layers = growth["layer_map"]
        fits = (growth["from_layers"], growth["to_layers"], len(layers)) == (shallow, deep, deep)
        if not fits or not all(layer is None or layer < shallow for layer in layers):
            where = f"{root / 'metrics.jsonl'} has a growth at stage {number}"
            raise UserError(f"{where} that does not lead from {before} to {after}; {MEND}.")
        found.append(growth)
    return found


def layers_of(name: str) -> int | None:
    """The layers that an exported stage's name promises; None for any other model."""
    return int(_parts(name)[1]) if STAGE.fullmatch(name) else None


def _parts(stage: str) -> tuple[str, str]:
    """Number and layers of an exported stage."""
    match = STAGE.fullmatch(stage)
    assert match is not None
    return match[1], match[2]
