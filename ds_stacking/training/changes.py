"""What a run that goes on may change: how fast it learns from here on, how it is watched and run, and not what it is.

A checkpoint holds every setting by its name: so a change can be told, and what would make another run refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from ds_stacking.common.errors import UserError
from ds_stacking.config import RunConfig, StageConfig

Settings = dict[str, Any]
"""Values by dotted name, such as "optimizer.clip" and "stages[1].lr"."""

PLACES = (
    *("name", "description", "deepspeed_config", "output_dir", "overwrite", "resume", "branch_from", "data"),
    "corpus.cache_dir",
)
"""Where a run lies and comes from; that its data are the same is told by their fingerprint."""
FREE = (
    *("precision", "micro_batch_size", "kernels", "compile", "growth_memory", "hang_timeout", "tracking"),
    *("log_every", "eval_every", "eval_after_growth", "checkpoint_every", "checkpoint_keep", "checkpoint_async"),
    *("lr", "schedule", "warmup_steps", "decay_percent"),
    *("optimizer.clip", "skip_above_sigma", "max_skipped_steps"),
    *("corpus.verify", "corpus.max_document", "corpus.max_expansion", "corpus.zstd_window"),
)
"""What may change at any resumption."""
FREE_IN_STAGES = ("micro_batch_size", "zero_stage")
"""What may change in every stage; for one that is over it means nothing."""
FREE_IF_NOT_OVER = ("steps", "lr", "lr_end", "lr_steps", "warmup_steps", "rewarm_steps")
"""What may change in the current stage and in those to come."""
OTHER_RUN = "--branch_from begins a new run with this one's state, in another --output_dir"


def settings(config: RunConfig) -> Settings:
    """All settings of a run but the model's, which stand beside them."""
    values = config.to_dict()
    values.pop("model")
    return {name: value for name, value in _flat(values) if name not in PLACES}


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
    try:
        content = json.loads((Path(config.run_dir) / "config.json").read_bytes())
        saved = {name: content[name] for name in config.to_dict()}
        model = saved.pop("model")
        then = {name: value for name, value in _flat(saved) if name not in PLACES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # of an older version
    changes = {name: pair for name, pair in find_changes(then, settings(config)).items() if name not in FREE}
    for name, value in config.to_dict()["model"].items():
        if model.get(name) != value and not (name == "vocab_size" and value == 0):
            changes[f"model.{name}"] = (model.get(name), value)
    resolved = (*FREE_IN_STAGES, *(() if config.trigger == "steps" else ("steps",)))
    other = {name: pair for name, pair in changes.items() if name.split("].")[-1] not in resolved}
    if other:
        raise UserError(
            f"output_dir {config.run_dir} holds a finished run with other settings ({describe(other)}); "
            f"choose another --output_dir, or replace it by --overwrite in the place of --resume."
        )


def describe(changes: Settings) -> str:
    """The changes in one line."""
    return ", ".join(f"{name} {json.dumps(a)} -> {json.dumps(b)}" for name, (a, b) in changes.items())


def saved_settings(identity: Mapping[str, Any], run_dir: Path, config: RunConfig) -> Settings | None:
    """The settings that a checkpoint of this `identity` was saved under; None where nothing tells.

    Older versions saved one digest of them: it is that of the present `config`, or of the one in the run directory.
    """
    if "settings" in identity:
        return dict(identity["settings"])
    if _old_digest(config.to_dict()) == identity.get("recipe"):
        return settings(config)
    try:
        content = json.loads((run_dir / "config.json").read_bytes())
        known = {field.name for field in fields(RunConfig)}
        found = {name: value for name, value in content.items() if name in known}
        if _old_digest(found) != identity["recipe"]:
            return None
        found.pop("model")
        return {name: value for name, value in _flat(found) if name not in PLACES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _old_digest(config: dict[str, Any]) -> str:
    """The digest that versions before `settings` saved as "recipe"."""
    free = {name.split(".")[0] for name in PLACES if "." not in name} | {"precision", "micro_batch_size", "tracking"}
    free |= {"log_every", "checkpoint_every", "checkpoint_keep", "checkpoint_async"}
    free |= {"kernels", "compile", "growth_memory", "max_skipped_steps", "hang_timeout"}
    decisive = {name: value for name, value in config.items() if name not in free}
    decisive["corpus"] = {
        name: value for name, value in decisive["corpus"].items() if f"corpus.{name}" not in {*PLACES, *FREE}
    }
    decisive["stages"] = [
        {name: value for name, value in stage.items() if name not in FREE_IN_STAGES} for stage in decisive["stages"]
    ]
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _may_change(name: str, stage: int) -> bool:
    if not name.startswith("stages["):
        return name in FREE
    number, field = name.removeprefix("stages[").split("].")
    return field in FREE_IN_STAGES or (field in FREE_IF_NOT_OVER and int(number) >= stage)


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    elif name == "stages":
        for number, stage in enumerate(values):
            yield from _flat(stage, f"stages[{number}]")
    else:
        yield name, values


DEFAULTS: Settings = dict(_flat(RunConfig().to_dict()))
STAGE_DEFAULTS: Settings = {f.name: f.default for f in fields(StageConfig) if f.default is not MISSING}


def _default(name: str) -> Any:
    return STAGE_DEFAULTS.get(name.split("].")[-1]) if name.startswith("stages[") else DEFAULTS.get(name)
