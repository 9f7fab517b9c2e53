"""Starting engines where a killed process left torch's compilation lock behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def build_with_offload() -> str:
    from tests.engine.tiny import factory, spec

    return type(factory(2, offload=True).build(spec(1)).basic_optimizer).__name__


def test_a_lock_that_a_killed_process_left_does_not_hang_offload() -> None:
    run_ranks(1, build_with_offload)  # compiled now, if not before
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    lock.touch()
    assert run_ranks(2, build_with_offload, timeout=100) == ["DeepSpeedCPUAdam"] * 2
    assert not lock.exists()


def shared_memory_operator() -> object:
    from deepspeed import comm

    return comm.comm.cdb.shm_comm_op


def test_no_compiler_runs_at_a_start_without_offload() -> None:
    """DeepSpeed compiles its shared-memory all-reduce for CPUs at every first start, under torch's lock."""
    assert run_ranks(2, shared_memory_operator) == [None, None]
