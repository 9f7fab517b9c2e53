"""The workspace for wandb: serialised as its server gets it, and every panel's metric is one that a run logs."""

from __future__ import annotations

import json
import re

import pytest

from ds_stacking.config import UserError
from ds_stacking.reports.workspace import build_workspace, save_workspace, workspace_json
from ds_stacking.training.tracking import AXES


def test_it_serialises_with_every_section() -> None:
    workspace = json.loads(workspace_json(build_workspace("team", "stacking")))
    assert (workspace["entity"], workspace["project"]) == ("team", "stacking")
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Loss", "Growths", "Blocks after a growth", "Speed and optimisation", "Comparison of arms",
    ]  # fmt: skip
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    metrics = {metric for panel in panels for metric in panel["metrics"] or []}
    kinds = {metric.split("/")[0] for metric in metrics}
    assert kinds <= {"train", "eval", "growth", "layers"}
    assert {panel.get("xAxis") for panel in panels} - {None} <= set(AXES)
    patterns = [panel["metricRegex"] for panel in panels if panel.get("metricRegex")]
    assert any(re.fullmatch(pattern, "after_growth/weight_norm/11") for pattern in patterns)
    assert sum(bool(panel.get("groupBy")) for panel in panels) >= 4, "seeds of an arm become one band"


def test_without_a_network_it_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="give --out FILE"):  # WANDB_MODE is offline in all tests
        save_workspace("team", "stacking")
