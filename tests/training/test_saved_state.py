"""What a checkpoint holds beside the engine's state: every field that is missing or mistyped is named."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_stacking.common.errors import UserError
from ds_stacking.config import ModelConfig, RunConfig
from ds_stacking.engine.stage_manager import GrowthRecord
from ds_stacking.growth.plan import ParameterInfo
from ds_stacking.models.convert import parameter_shapes
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.saved_state import check_fits, saved_state
from ds_stacking.training.state import HeldOutLoss, Position, TrainState

NAN = float("nan")
LOSS_SUM = {"loss_sum": 1.5}
"""Of one rank; a checkpoint has those of all."""


def saved() -> dict[str, Any]:
    """What a run of two stages saves, from the classes that it saves."""
    ledger = Ledger()
    ledger.start_stage(1), ledger.start_stage(2)
    growth = GrowthRecord(
        from_layers=1, to_layers=2, operator="stack", optimizer_state="stack", stage=1, layer_map=[0, None],
        seconds=0.1, bytes_moved=9, bytes_received=0, tensors_verified=3, leaked_bytes=0,
    )  # fmt: skip
    return {
        "position": asdict(Position(step=12, stage=1, stage_step=4, samples=192)),
        "stage_end": False,
        "ledger": ledger.state_dict(),
        "growths": [asdict(growth)],
        "evaluated": [10, 2, {"all_positions": NAN, "masked": 4.6}],
        "stage_steps": [8, 8],
        "held_out_losses": [[1e8, 4.7], [2e8, NAN]],
        "loss_sum": [0.0],
        "steps_in_loss": 0,
        "health": {"skipped": 0, "in_a_row": 0, "window": [4.5]},
        "changes": [{"step": 3, "field": "lr", "from": 0.1, "to": 0.2}],
        "metrics_bytes": 9932,
    }


def judge(extra: Any) -> dict[str, Any]:
    return saved_state(SimpleNamespace(path=Path("step-12"), extra=extra))  # type: ignore[arg-type]


def test_what_a_run_saves_is_taken() -> None:
    judge(saved())
    judge(saved() | {"evaluated": None})
    judge({name: value for name, value in saved().items() if name not in ("changes", "held_out_losses")})
    grown_on_disk = saved()
    grown_on_disk["position"] |= {"stage": 2, "stage_step": 0}
    judge(grown_on_disk)


def test_what_an_earlier_version_saved_is_taken() -> None:
    """It called the loss at all positions `every`, and knew no changes and no losses for a plateau."""
    old = {name: value for name, value in saved().items() if name not in ("changes", "held_out_losses")}
    old["evaluated"] = [10, 2, {"every": 4.5, "masked": 4.6}]
    found = judge(json.loads(json.dumps(old))) | LOSS_SUM
    state = TrainState(device=torch.device("cpu"), stage_steps=[])
    state.load_state_dict(found)
    assert state.evaluated == (10, 2, HeldOutLoss(all_positions=4.5, masked=4.6))
    assert state.changes == state.held_out_losses == []


def test_a_state_is_what_it_was_after_it_was_saved_and_loaded() -> None:
    first, second = (TrainState(device=torch.device("cpu"), stage_steps=[]) for _ in range(2))
    first.load_state_dict(judge(saved() | {"evaluated": [10, 2, {"all_positions": 4.5, "masked": 4.6}]}) | LOSS_SUM)
    plain = first.state_dict()
    second.load_state_dict(json.loads(json.dumps(plain)))
    assert json.dumps(second.state_dict()) == json.dumps(plain)
    assert second.position == first.position and second.steps_left == 4 and second.charged == 12


@pytest.mark.parametrize("name", sorted(saved().keys() - {"changes", "held_out_losses"}))
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"The state of checkpoint step-12 .*: {name}: field required; give another"):
        judge({key: value for key, value in saved().items() if key != name})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("position", None), ("position>step", "12"), ("position>step", -12), ("position>stage", 1.5),
        ("stage_end", 0), ("ledger", []),
        ("ledger>stages", {}), ("ledger>stages>0", 1), ("ledger>stages>0>layers", "1"), 
        ("ledger>phases", []), ("ledger>phases>growth", "x"),
        ("ledger>cpu_phases>growth", None), ("growths", {}), ("growths>0", []), ("growths>0>layer_map", "00"),
        ("growths>0>seconds", "x"), 
        ("growths>0>observations", [1]), ("evaluated", [1, 2]), ("evaluated", {}), ("evaluated>2", 4.5),
        ("stage_steps", [None]), ("stage_steps", 8),
        ("held_out_losses", [[1.0]]), ("held_out_losses", [1.0]), ("loss_sum", 0.0), ("loss_sum", ["x"]),
        ("steps_in_loss", -1), ("health", None), ("health>window", [None]), ("health>skipped", "x"),
        ("changes", {}), ("changes>0>field", 5), ("changes>0", None), ("metrics_bytes", -1), ("metrics_bytes", "x"),
    ],
)  # fmt: skip
def test_a_mistyped_field_is_named(place: str, value: Any) -> None:
    extra = copy.deepcopy(saved())
    *parents, last = place.split(">")
    inner: Any = extra
    for parent in parents:
        inner = inner[int(parent) if isinstance(inner, list) else parent]
    inner[int(last) if isinstance(inner, list) else last] = value
    with pytest.raises(UserError, match=f"damaged .*: {parents[0] if parents else last}"):
        judge(extra)


def test_a_ledger_of_another_stage_is_named() -> None:
    position = {"step": 12, "stage": 7, "stage_step": 0, "samples": 1}
    with pytest.raises(UserError, match="counts 2 stages and stands in another"):
        judge(saved() | {"position": position})


def test_parameters_and_steps_that_contradict_the_run_are_named(tmp_path: Path) -> None:
    model = ModelConfig(hidden_size=24, num_heads=3, vocab_size=101, max_positions=64)
    config = RunConfig(model=model, stages="2:5,4:5")
    parameters = {n: ParameterInfo(numel=s.numel(), decay=True) for n, s in parameter_shapes(model, 2).items()}
    reader: Any = SimpleNamespace(path=tmp_path, extra=saved(), step=12, parameters=parameters)
    check_fits(reader, config)
    reader.step = 13
    with pytest.raises(UserError, match="extra.position.step is 12, and step is 13"):
        check_fits(reader, config)
    reader.step = 12
    taken = parameters.pop("final_norm.bias", None) or parameters.pop("embeddings.norm.bias")
    with pytest.raises(UserError, match=f"norm.bias has no elements, and {taken.numel} in this model"):
        check_fits(reader, config)
    for name in [name for name in parameters if name.startswith("blocks.1.")]:
        del parameters[name]
    check_fits(reader, config)
