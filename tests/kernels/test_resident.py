"""Persistent kernels launch as many programs as stay resident, by the compiled figures of every Triton."""

import importlib
import json
import re
from pathlib import Path

import pytest

from ds_stacking.kernels.add_layer_norm import BACKWARD_WARPS, FORWARD_WARPS
from ds_stacking.kernels.bias_gelu import BACKWARD_PROGRAMS

TABLES = sorted(
    (Path(importlib.import_module("ds_stacking.kernels.offline").__file__).parent / "compiled").glob("*.json")
)
LAUNCHED = {
    ("add_layer_norm", "_forward"): FORWARD_WARPS,
    ("add_layer_norm", "_backward"): BACKWARD_WARPS,
    ("embedding_norm", "_backward"): BACKWARD_WARPS,
    ("bias_gelu", "_backward"): 4 * BACKWARD_PROGRAMS,
}
"""Warps per multiprocessor of sm_90, by operator and kernel."""


def resident_warps(table, operator, kernel):
    """Of each of the kernel's rows in a compiled table."""
    return [
        row["programs"] * int(re.search(r"warps=(\d+)", row["config"])[1])
        for row in table
        if (row["case"].split("/")[0], row["kernel"], row["target"]) == (operator, kernel, "sm_90")
    ]


@pytest.mark.parametrize("operator, kernel", LAUNCHED)
def test_as_many_as_stay_in_every_configuration(operator, kernel):
    assert len(TABLES) >= 2
    found = [warps for path in TABLES for warps in resident_warps(json.loads(path.read_text()), operator, kernel)]
    assert min(found) == LAUNCHED[operator, kernel]
