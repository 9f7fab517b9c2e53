"""What a checkpoint says of its run: made up, it is one sentence, though all its hashes are right."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ds_stacking.checkpoint.store import CheckpointReader
from ds_stacking.common.errors import UserError
from ds_stacking.engine.record import GrowthRecord
from ds_stacking.evaluation.masked_lm import HeldOutLoss
from ds_stacking.training.ledger import Ledger
from ds_stacking.training.saved_state import ledger_values, saved_state

GROWTH = {
    **{"from_layers": 1, "to_layers": 2, "operator": "stack", "optimizer_state": "stack", "stage": 1},
    **{"layer_map": [0, None], "seconds": 0.1, "bytes_moved": 1, "bytes_received": 0, "tensors_verified": 3},
    "leaked_bytes": 0,
}
GOOD: dict[str, Any] = {
    "position": {"step": 8, "stage": 1, "stage_step": 0, "samples": 99},
    "stage_end": False,
    "ledger": {"stages": [{"layers": 1, "steps": 8}], "phases": {"training": 1.0}, "cpu_phases": {}},
    "growths": [GROWTH],
    "evaluated": [8, 1, {"every": float("nan"), "masked": 5.0}],
    "stage_steps": [8, 8],
    "logged_losses": [[1.0, 5.0]],
    "loss_sum": [0.5, float("nan")],
    "steps_in_loss": 1,
    "health": {"skipped": 0, "in_a_row": 0, "window": []},
    "metrics_bytes": 100,
}


def reader(extra: Any) -> CheckpointReader:
    return cast(CheckpointReader, SimpleNamespace(path=Path("step-8"), extra=extra))


def test_what_a_run_saves_is_read() -> None:
    saved = saved_state(reader(GOOD))
    assert saved["growths"][0] == GrowthRecord(**GROWTH | {"layer_map": (0, None)})
    assert saved["evaluated"] is not None and isinstance(saved["evaluated"][2], HeldOutLoss)
    ledger = Ledger.from_dict(ledger_values(saved["ledger"]))
    assert ledger.stages[0].steps == 8 and ledger.phases["training"] == 1.0 and ledger.phases["other"] >= 0


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("position",), None, "position: input should be an object"),
        (("position", "step"), "8", "position.step: input should be a valid integer"),
        (("position", "stage"), -1, "position.stage: .*greater than or equal to 0"),
        (("position", "stage"), 5, "counts 1 stages and stands in another"),
        (("position", "step"), 10**18, "position.step"),
        (("stage_end",), "yes", "stage_end: .*valid boolean"),
        (("ledger", "stages"), [{"layers": []}], "ledger.stages.0.layers"),
        (("ledger", "phases"), {"training": "long"}, "ledger.phases.training"),
        (("growths",), [{}], "growths.0.from_layers: field required"),
        (("evaluated",), [1], "evaluated"),
        (("loss_sum",), {}, "loss_sum: .*valid array"),
        (("health", "window"), ["x"], "health.window.0"),
        (("metrics_bytes",), -5, "metrics_bytes: .*greater than or equal to 0"),
        (("changes",), [3], "changes.0"),
    ],
)
def test_what_is_made_up_is_refused(where: tuple[str, ...], value: Any, said: str) -> None:
    extra = copy.deepcopy(GOOD)
    inner = extra
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    with pytest.raises(UserError, match=f"The state of checkpoint step-8 .*{said}.*; give another checkpoint"):
        saved_state(reader(extra))


@pytest.mark.parametrize("extra", [None, [], "x", {}])
def test_no_state_at_all(extra: Any) -> None:
    with pytest.raises(UserError, match="The state of checkpoint step-8 is damaged"):
        saved_state(reader(extra))
