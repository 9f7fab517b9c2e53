"""Every kernel compiles, offline, in every configuration that it may run in, and has not become worse.

After a change that is meant to move these figures: `python -m ds_stacking.kernels.offline` and commit the table.
"""

import dataclasses
import os

import pytest
import triton

from ds_stacking.kernels.cases import CASES
from ds_stacking.kernels.offline import compile_all, compile_one, format_rows, read_table, tasks

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Shared memory that one program may use, in bytes."""
MATRIX_KERNELS = {
    "forward",
    "backward_queries",
    "backward_keys",
    "backward_short",
    "backward_heads",
    "selected_forward",
    "selected_backward_queries",
    "selected_backward_keys",
    "_statistics",
    "_gradient",
    "_linear",
}
TOO_SHORT = {"attention/16-dropout", "attention/32-dropout"}
"""Whole heads of fewer than the 64 rows that a wgmma instruction takes."""
MEMORY_KERNELS = {"add_layer_norm", "bias_gelu", "embedding_norm", "fp8_cast", "gather_rows"}


@pytest.fixture(scope="module")
def todo():
    return tasks(CASES)


@pytest.fixture(scope="module")
def rows(todo):
    return compile_all(todo, workers=min(4, os.cpu_count() or 1))


def offenders(rows):
    return "\n" + format_rows(rows)


def test_everything_was_compiled(todo, rows):
    assert len(rows) == len(todo) > 100
    assert {row.target for row in rows} == set(SHARED_LIMIT)
    assert {row.kernel for row in rows} >= MATRIX_KERNELS
    assert {row.case.split("/")[0] for row in rows} == MEMORY_KERNELS | {
        "attention", "selected_attention", "linear_cross_entropy", "linear_gelu",
    }  # fmt: skip


def test_nothing_spills_and_everything_fits(rows):
    bad = [row for row in rows if row.spills or row.shared > SHARED_LIMIT[row.target] or row.programs < 1]
    assert not bad, offenders(bad)


def test_matrix_kernels_use_hopper_instructions(rows):
    bad = [
        row
        for row in rows
        if row.target == "sm_90" and row.kernel in MATRIX_KERNELS and row.wgmma == 0
        and "fp32" not in row.case and row.case not in TOO_SHORT
    ]  # fmt: skip
    assert not bad, offenders(bad)


def test_memory_bound_kernels_move_128_bits_at_a_time(rows):
    bad = [row for row in rows if row.case.split("/")[0] in MEMORY_KERNELS and row.vectors < 2]
    assert not bad, offenders(bad)


def test_figures_are_those_of_the_table(rows):
    table = {row.key: row for row in read_table()}
    assert table, "no table for the installed Triton; make it with: python -m ds_stacking.kernels.offline"
    assert {row.key for row in rows} == set(table), "kernels or configurations changed; make the table anew"
    changed = [row for row in rows if row != table[row.key]]
    assert not changed, f"{offenders(changed)}\nwere\n{format_rows([table[row.key] for row in changed])}"


def test_a_spilling_configuration_is_noticed(todo):
    task = next(t for t in todo if t.case == "attention/128" and t.launch.kernel.fn.__name__ == "backward_short")
    task = dataclasses.replace(task, case="fault", config=triton.Config({"STAGES": 1}, num_warps=4))  # far too few
    with pytest.raises(AssertionError, match="fault"):
        test_nothing_spills_and_everything_fits([compile_one(task)])
