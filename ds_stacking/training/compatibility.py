"""Whether a checkpoint that is whole is one that this run can go on from: asked while one is searched for."""

from __future__ import annotations

from ds_stacking.checkpoint.format import STATE
from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError
from ds_stacking.common.words import shown
from ds_stacking.config import RunConfig
from ds_stacking.growth.blocks import find_block_names
from ds_stacking.models.convert import parameter_shapes
from ds_stacking.training.saved_state import saved_state

MEND = "restore that file"


def check_fits(reader: CheckpointReader, config: RunConfig) -> None:
    """Raise UserError where the checkpoint's parameters or the run's own values are not what a resumption reads.

    A depth that the run has in none of its stages is refused elsewhere, with what to do about it.
    """
    where, step = reader.path / STATE, saved_state(reader)["position"]["step"]
    if step != reader.step:
        raise UserError(f"{where}: extra.position.step is {step}, and step is {reader.step}; {MEND}.")
    found = {name: info.numel for name, info in reader.parameters.items()}
    layers = find_block_names({name: (numel,) for name, numel in found.items()}).count
    if layers not in {stage.layers for stage in config.stages}:
        return
    expected = {name: shape.numel() for name, shape in parameter_shapes(config.model, layers).items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            there, here = found.get(name, "no"), expected.get(name, "no")
            raise UserError(
                f"{where}: parameters.{shown(name)[1:-1]} has {there} elements, and {here} in this model; {MEND}."
            )
