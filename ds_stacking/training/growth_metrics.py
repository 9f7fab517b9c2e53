"""What becomes of a growth: the held-out loss later, norms by block, and how copies part from their originals.

After 1, 2, 5, 10, 20, 50, ... optimizer steps of a stage the state of its engine is looked at, where it lies. The
gradient is the one that Adam took, averaged over ranks and clipped: (m' - beta1 m) / (1 - beta1), m and m' being
exp_avg before and after the step. That needs no access to DeepSpeed's gradient buffers, which every ZeRO stage lays
out in its own way, and costs a copy of the rank's exp_avg on the host for the time of these steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ds_stacking.engine.factory import Engine, device
from ds_stacking.engine.release import collect
from ds_stacking.engine.stage_manager import StageManager
from ds_stacking.engine.zero_state import LiveState
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.exchange import make_exchange
from ds_stacking.growth.operators import LayerMap
from ds_stacking.growth.similarity import copies, cosines, norms, seams
from ds_stacking.growth.state import ParkedState, TensorSlice
from ds_stacking.training.metrics import Metrics
from ds_stacking.training.progress import growth_later_line
from ds_stacking.training.state import TrainState


def is_looked_at(steps: int) -> bool:
    """Whether a growth is looked at `steps` optimizer steps after it."""
    digits = str(steps)
    return digits[0] in "125" and set(digits[1:]) <= {"0"}


def snapshot_moments(state: TrainState, engine: Engine) -> ParkedState | None:
    """Before a step: this rank's exp_avg, on the host, where the growth is looked at after the step."""
    position = state.position
    if state.growing or not position.stage or not state.growths or not is_looked_at(position.stage_step + 1):
        return None
    return ParkedState(LiveState(engine), kinds=("exp_avg",))


def observe_growth(metrics: Metrics, before: ParkedState, *, taken: bool) -> None:
    """After the step: log what the blocks look like, and keep it in the growth's record. Collective.

    Without a step `taken` there is no gradient to tell of.
    """
    growth = metrics.state.growths[-1]
    with metrics.ledger.clock("evaluation"):
        found = {"steps_since": metrics.state.position.stage_step}
        found |= _observation(
            metrics.manager, tuple(growth.layer_map), metrics.config.optimizer.betas[0], before, taken
        )
    growth.observations.append(found)
    metrics.record("after_growth", found)


def note_later_loss(metrics: Metrics) -> None:
    """After an evaluation: keep its loss where it is the one that the growth's record waits for."""
    state = metrics.state
    if not state.growths or state.position.stage_step != metrics.config.eval_after_growth or not state.evaluated:
        return
    growth = state.growths[-1]
    if growth.stage == state.position.stage and growth.eval_loss_later is None:
        state.growths[-1] = replace(growth, eval_loss_later=state.evaluated[2].all_positions)
        metrics.log(growth_later_line(asdict(state.growths[-1]), state.position.stage_step))


def _observation(
    manager: StageManager, layers: LayerMap, beta: float, before: ParkedState, taken: bool
) -> dict[str, Any]:
    """Plain JSON values; blocks are numbered as in the grown model. `beta` is Adam's first."""
    state, parameters, exchange = LiveState(manager.engine), manager.parameters, make_exchange(device())
    blocks = find_blocks(manager.engine.module)
    numels = {name: info.numel for name, info in parameters.items()}
    labels = {name: str(parts[0]) for name, info in parameters.items() if (parts := blocks.split(name)) and info.decay}

    def gradient(piece: TensorSlice) -> Tensor:
        after = state.read(piece, "exp_avg")
        return (after.double() - beta * before.read(piece, "exp_avg").to(after.device).double()) / (1 - beta)

    weight_norm = norms(state.slices(), lambda piece: state.read(piece, "master"), labels, numels, exchange)
    gradient_norm = norms(state.slices(), gradient, labels, numels, exchange) if taken else {}
    collect()  # the exchange may be NCCL's first between two ranks, for which it takes memory beside torch's
    likeness = cosines(state, parameters, blocks, copies(layers), exchange)
    return {
        "weight_norm": weight_norm,
        "weight_norm_jump": _jumps(weight_norm, seams(layers)),
        "gradient_norm": gradient_norm,
        "gradient_norm_jump": _jumps(gradient_norm, seams(layers)),
        **{f"copy_cosine_{kind}": {str(k): v for k, v in found.items()} for kind, found in likeness.items()},
    }


def _jumps(norm: Mapping[str, float], places: Sequence[int]) -> dict[str, float]:
    """The norm of every block that stands on a seam, divided by that of the block below it."""
    return {str(at): norm[str(at)] / norm[str(at - 1)] for at in places if norm.get(str(at - 1))}
