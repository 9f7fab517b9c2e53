"""What a run that goes on may change: how fast it learns from here on, how it is watched and run, and not what it is.

A checkpoint holds every setting by its name: so a change can be told, and what would make another run refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from hashlib import sha256
from os.path import commonprefix
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, check_value, read_json
from ds_stacking.common.words import LONGEST, plain
from ds_stacking.config import RENAMED, RunConfig, StageConfig
from ds_stacking.training.run_directory import CONFIG

SETTING = re.compile(r"(stages\[\d{1,5}\]\.)?\w{1,50}(\.\w{1,50})?")
Settings = dict[str, Any]
"""Values by dotted name, such as "optimizer.clip" and "stages[1].lr"."""

PLACES = (
    *("name", "description", "deepspeed_config", "output_dir", "overwrite", "shared", "resume"),
    *("branch_from", "data"),
    *("corpus.cache_dir", "corpus.sentences", "corpus.near_duplicates"),
)
"""Where a run lies and comes from; that its data are the same is told by their fingerprint."""
WITHOUT_EFFECT = (
    *("hang_timeout", "tracking", "log_every", "checkpoint_every", "checkpoint_keep", "checkpoint_async"),
    *("corpus.verify", "corpus.max_document", "corpus.max_expansion", "corpus.zstd_window"),
    *("corpus.follow_links", "corpus.max_leak", "corpus.fingerprint", "corpus.workers"),
)
"""What decides neither what a run learns nor what that costs: how it is watched and saved, and its data are read."""
CHANGEABLE = (
    *WITHOUT_EFFECT,
    *(
        "precision",
        "micro_batch_size",
        "kernels",
        "tiles",
        "compile",
        "growth_memory",
        "eval_every",
        "eval_after_growth",
    ),
    *("lr", "schedule", "warmup_steps", "decay_percent"),
    *("optimizer.clip", "skip_above_sigma", "max_skipped_steps"),
)
"""What may change at any resumption."""
CHANGEABLE_IN_STAGES = ("micro_batch_size", "zero_stage")
"""What may change in every stage; for one that is over it means nothing."""
CHANGEABLE_IF_NOT_OVER = ("steps", "lr", "lr_end", "lr_steps", "warmup_steps", "rewarm_steps")
"""What may change in the current stage and in those to come."""
OTHER_RUN = "--branch_from begins a new run with this one's state, in another --output_dir"


class SavedStage(TypedDict):
    """A stage in config.json."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    layers: Count
    steps: Count
    micro_batch_size: NotRequired[int | str | None]


class SavedConfig(TypedDict):
    """What is read of a run's config.json; an older version may lack other fields."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    model: dict[str, Any]
    corpus: dict[str, Any]
    optimizer: dict[str, Any]
    stages: list[SavedStage]


def settings(config: RunConfig) -> Settings:
    """All settings of a run but the model's, which stand beside them."""
    return {name: value for name, value in by_name(config.to_dict()).items() if not name.startswith("model.")}


def by_name(saved: Mapping[str, Any]) -> Settings:
    """The settings in a configuration of any version, the model's too, by the names that they have today."""
    return {name: value for name, value in _flat(_renamed(saved)) if name not in PLACES}


def find_changes(then: Settings, now: Settings) -> Settings:
    """Each setting that differs, with both values: {"lr": (0.002, 0.001)}.

    A checkpoint of an older version knows fewer settings; what it lacks was what is the default today.
    """
    found = {name: (then.get(name, _default(name)), value) for name, value in now.items()}
    found |= {name: (value, None) for name, value in then.items() if name[:7] == "stages[" and name not in now}
    return {name: pair for name, pair in sorted(found.items()) if pair[0] != pair[1]}


def refuse_another_run(path: Path, changes: Settings, stage: int = 0) -> None:
    """Raise UserError where one of the changes would make another run of the one in `path`, in its stage `stage`."""
    other = {name: pair for name, pair in changes.items() if not _may_change(name, stage)}
    if other:
        listed = [f"{name} is {json.dumps(a)} there and {json.dumps(b)} here" for name, (a, b) in other.items()]
        raise UserError(
            f"{path} is of another run: {', '.join(listed)}; give it the same, or leave it alone: {OTHER_RUN}."
        )


def refuse_another_finished_run(config: RunConfig) -> None:
    """Raise UserError where the run directory's finished run had settings that would make another run of it."""
    content = read_config(Path(config.run_dir))
    if content is None or not config.to_dict().keys() <= content.keys() | {*PLACES, *CHANGEABLE}:
        return  # of an older version
    resolved = (*CHANGEABLE_IN_STAGES, *(() if config.trigger == "steps" else ("steps",)))
    resolved += () if config.model.vocab_size else ("model.vocab_size",)
    changes = find_changes(by_name(content), by_name(config.to_dict()))
    changes = {name: pair for name, pair in changes.items() if name not in CHANGEABLE}
    other = {name: pair for name, pair in changes.items() if name.split("].")[-1] not in resolved}
    if other:
        raise UserError(
            f"output_dir {config.run_dir} holds a finished run with other settings ({describe(other)}); "
            f"choose another --output_dir, or replace it by --overwrite in the place of --resume."
        )


def describe(changes: Settings) -> str:
    """The changes in one line; of long values what follows a common beginning."""
    both = {plain(name, LONGEST): _shown(*map(json.dumps, pair)) for name, pair in changes.items()}
    return ", ".join(f"{name} {' -> '.join(pair)}" for name, pair in both.items())


def _shown(*texts: str) -> list[str]:
    """Texts cut short where they do not differ."""
    start = max(0, len(commonprefix(texts)) - LONGEST // 2) if max(map(len, texts)) > LONGEST else 0
    return [f"{'...' * bool(start)}{plain(text[start:], LONGEST)}" for text in texts]


def saved_settings(identity: Mapping[str, Any], run_dir: Path, config: RunConfig) -> Settings | None:
    """The settings that a checkpoint of this `identity` was saved under; None where nothing tells.

    Older versions saved one digest of them: it is that of the present `config`, or of the one in the run directory.
    """
    if "settings" in identity:
        mend = "give another checkpoint"
        saved = check_value(identity["settings"], dict[str, Any], where="The manifest of the checkpoint", mend=mend)
        if strange := next((name for name in saved if not SETTING.fullmatch(name)), None):
            raise UserError(
                f"The checkpoint was saved under a setting {ascii(strange)[:60]}, which no run has; {mend}."
            )
        return _renamed(saved)
    if _old_digest(config.to_dict()) == identity.get("recipe"):
        return settings(config)
    content = read_config(run_dir)
    found = {name: value for name, value in (content or {}).items() if name in RunConfig.__dataclass_fields__}
    if not found or _old_digest(found) != identity.get("recipe"):
        return None
    del found["model"]
    return by_name(found)


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """The content of a run's config.json; None where there is none. Raises UserError where it is damaged."""
    mend = "restore it, or start again with --overwrite in the place of --resume"
    try:
        return _renamed(read_json(run_dir / CONFIG, SavedConfig, mend=mend, inside=run_dir))
    except FileNotFoundError:
        return None


def _renamed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings by the names that they have today."""
    return {RENAMED.get(name, name): value for name, value in saved.items()}


def _old_digest(config: dict[str, Any]) -> str:
    """The digest that versions before `settings` saved as "recipe"."""
    if not all(name in config for name in ("corpus", "stages")):
        return ""
    left_out = {*PLACES, *WITHOUT_EFFECT, "precision", "micro_batch_size", "kernels", "compile", "growth_memory"}
    left_out |= {"max_skipped_steps", "tiles"}
    then = {today: name for name, today in RENAMED.items()}
    decisive = {then.get(name, name): value for name, value in config.items() if name not in left_out}
    decisive["corpus"] = {
        name: value for name, value in decisive["corpus"].items() if f"corpus.{name}" not in {*PLACES, *CHANGEABLE}
    }
    decisive["stages"] = [
        {name: value for name, value in stage.items() if name not in CHANGEABLE_IN_STAGES}
        for stage in decisive["stages"]
    ]
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _may_change(name: str, stage: int) -> bool:
    if not name.startswith("stages["):
        return name in CHANGEABLE
    number, field = name.removeprefix("stages[").split("].")
    return field in CHANGEABLE_IN_STAGES or (field in CHANGEABLE_IF_NOT_OVER and int(number) >= stage)


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    elif name == "stages" and isinstance(values, list):
        for number, stage in enumerate(values):
            yield from _flat(stage, f"stages[{number}]")
    else:
        yield name, values


DEFAULTS: Settings = dict(_flat(RunConfig().to_dict()))
STAGE_DEFAULTS: Settings = {f.name: f.default for f in fields(StageConfig) if f.default is not MISSING}


def _default(name: str) -> Any:
    return STAGE_DEFAULTS.get(name.split("].")[-1]) if name.startswith("stages[") else DEFAULTS.get(name)
