"""What a checkpoint holds beside the engine's state: every field that is missing or mistyped is named."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.engine.stage_manager import GrowthRecord
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.loop import Position
from ds_stacking.training.saved_state import check_saved

NAN = float("nan")


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
        "ledger": ledger.to_dict(),
        "growths": [asdict(growth)],
        "evaluated": [10, 2, {"every": NAN, "masked": 4.6}],
        "stage_steps": [8, 8],
        "logged_losses": [[1e8, 4.7], [2e8, NAN]],
        "loss_sum": [0.0],
        "steps_in_loss": 0,
        "health": {"skipped": 0, "in_a_row": 0, "window": [4.5]},
        "changes": [{"step": 3, "field": "lr", "from": 0.1, "to": 0.2}],
        "metrics_bytes": 9932,
    }


def judge(extra: Any, step: int = 12, identity: Any = None) -> None:
    manifest = SimpleNamespace(identity=identity or {"settings": {"lr": 0.1, "stages[0].lr": None}})
    check_saved(SimpleNamespace(path=Path("step-12"), extra=extra, step=step, manifest=manifest))  # type: ignore[arg-type]


def test_what_a_run_saves_is_taken() -> None:
    judge(saved())
    judge(saved() | {"evaluated": None})
    judge({name: value for name, value in saved().items() if name != "changes"})
    grown_on_disk = saved()
    grown_on_disk["position"] |= {"stage": 2, "stage_step": 0}
    judge(grown_on_disk)
    judge(saved(), identity={"recipe": "of an older version"})


@pytest.mark.parametrize("name", sorted(saved().keys() - {"changes"}))
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"state.json, in extra, .*: {name}: field required; restore it"):
        judge({key: value for key, value in saved().items() if key != name})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("position", None), ("position>step", "12"), ("position>step", -12), ("position>stage", 1.5),
        ("position>samples", 10**30), ("position>more", 1), ("stage_end", 0), ("ledger", []),
        ("ledger>stages", {}), ("ledger>stages>0", 1), ("ledger>stages>0>layers", "1"), ("ledger>stages>0>more", 1),
        ("ledger>phases", []), ("ledger>phases>more", 1.0), ("ledger>phases>growth", "x"),
        ("ledger>cpu_phases>growth", None), ("growths", {}), ("growths>0", []), ("growths>0>layer_map", "00"),
        ("growths>0>layer_map>0", -1), ("growths>0>seconds", "x"), ("growths>0>more", 1),
        ("growths>0>observations", [1]), ("evaluated", [1, 2]), ("evaluated", {}), ("evaluated>2", 4.5),
        ("evaluated>2>more", 1), ("stage_steps", []), ("stage_steps", [None]), ("stage_steps", 8),
        ("logged_losses", [[1.0]]), ("logged_losses", [1.0]), ("loss_sum", 0.0), ("loss_sum", ["x"]),
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
    with pytest.raises(UserError, match=f"in extra, .*: {parents[0] if parents else last}"):
        judge(extra)


@pytest.mark.parametrize(
    ("extra", "step", "identity", "words"),
    [
        ({}, 13, None, "extra.position.step is 12, but the checkpoint is of step 13"),
        ({"position": {"step": 12, "stage": 7, "stage_step": 0, "samples": 1}}, 12, None, "position.stage is 7"),
        ({"position": {"step": 12, "stage": 0, "stage_step": 0, "samples": 1}}, 12, None, "extra.ledger has 2"),
        ({}, 12, {"settings": [1]}, r"identity.settings is \[1\]; it must be an object"),
        ({}, 12, {"settings": {"stages[x].lr": 1}}, r"identity.settings has 'stages\[x\].lr'"),
        ({}, 12, {"settings": {"stages[": 1}}, r"identity.settings has 'stages\['"),
    ],
)
def test_what_contradicts_itself_is_named(extra: Any, step: int, identity: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        judge(saved() | extra, step, identity)
