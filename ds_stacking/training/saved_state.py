"""What a checkpoint says of its run beside the engine's state, as the shape that a resumption can rely on.

Hashes tell that a checkpoint is what was written, not that a run of ours wrote it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NotRequired

from pydantic import BeforeValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from ds_stacking.checkpoint.format import STATE
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, parse_json
from ds_stacking.common.words import shown
from ds_stacking.config import RunConfig
from ds_stacking.engine.record import GrowthRecord
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.models.convert import parameter_shapes
from ds_stacking.training.ledger import StageTotals
from ds_stacking.training.state import HeldOutLoss

Bounded = Annotated[int, Field(ge=0, le=10**15)]
"""A whole number that counts something."""


def _by_todays_name(loss: Any) -> Any:
    """Earlier versions saved the loss at all positions as `every`."""
    return {"all_positions" if key == "every" else key: loss[key] for key in loss} if isinstance(loss, dict) else loss


class SavedPosition(TypedDict):
    """The fields of `Position`."""

    step: Bounded
    stage: Bounded
    stage_step: Bounded
    samples: Bounded
    by_length: NotRequired[dict[Annotated[str, Field(pattern="^[0-9]{1,8}$")], Bounded]]


class SavedLedger(TypedDict):
    """What `Ledger.state_dict` gives."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    stages: list[StageTotals]
    phases: dict[str, float]
    cpu_phases: dict[str, float]


class SavedHealth(TypedDict):
    """Steps that were skipped, and the losses that bound the next one."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    skipped: Bounded
    in_a_row: Bounded
    window: list[float]


class SavedChange(TypedDict):
    """A setting that a resumption changed, with "from" and "to" beside these."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    step: Bounded
    field: str


class Saved(TypedDict):
    """What `save` in training/checkpointing.py hands to the writer as `extra`: `TrainState.state_dict`, and more."""

    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    position: SavedPosition
    stage_end: bool
    ledger: SavedLedger
    growths: list[GrowthRecord]
    evaluated: tuple[int, int, Annotated[HeldOutLoss, BeforeValidator(_by_todays_name)]] | None
    stage_steps: list[Bounded]
    held_out_losses: NotRequired[list[tuple[float, float]]]
    loss_sum: list[float]
    steps_in_loss: Bounded
    health: SavedHealth
    changes: NotRequired[list[SavedChange]]
    metrics_bytes: Bounded


def saved_state(reader: CheckpointReader) -> dict[str, Any]:
    """The content of `reader.extra`. Raises UserError, one sentence, where it is not what a run saves."""
    where, mend = f"The state of checkpoint {reader.path}", "give another checkpoint"
    # through JSON, where a list may become a tuple and an object a record
    found = parse_json(json.dumps(reader.extra), Saved, where=where, mend=mend)
    if len(found["ledger"]["stages"]) not in (found["position"]["stage"], found["position"]["stage"] + 1):
        raise UserError(f"{where} counts {len(found['ledger']['stages'])} stages and stands in another; {mend}.")
    return {"changes": [], "held_out_losses": [], **TypeAdapter(Saved).dump_python(found)}


def check_fits(reader: CheckpointReader, config: RunConfig) -> None:
    """Raise UserError where the checkpoint's parameters or the run's own values are not what a resumption reads.

    A depth that the run has in none of its stages is refused elsewhere, with what to do about it.
    """
    where, mend, step = reader.path / STATE, "restore that file", saved_state(reader)["position"]["step"]
    if step != reader.step:
        raise UserError(f"{where}: extra.position.step is {step}, and step is {reader.step}; {mend}.")
    found = {name: info.numel for name, info in reader.parameters.items()}
    layers = find_block_names({name: (numel,) for name, numel in found.items()}).count
    if layers not in {stage.layers for stage in config.stages}:
        return
    expected = {name: shape.numel() for name, shape in parameter_shapes(config.model, layers).items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            there, here = found.get(name, "no"), expected.get(name, "no")
            raise UserError(
                f"{where}: parameters.{shown(name)[1:-1]} has {there} elements, and {here} in this model; {mend}."
            )
