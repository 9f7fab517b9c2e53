"""Starting engines where a killed process left torch's compilation lock behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def build_with_offload() -> str:
    from tests.engine.tiny import factory, spec

    return type(factory(2, offload=True).build(spec(1)).basic_optimizer).__name__


def build_with_offload_in(extensions: Path) -> str:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    return build_with_offload()


def test_a_lock_that_a_killed_process_left_does_not_hang_offload(tmp_path: Path) -> None:
    run_ranks(1, build_with_offload)  # compiled now, if not before
    copy = tmp_path / "cpu_adam"  # tests beside this one use the original
    shutil.copytree(_get_build_directory("cpu_adam", verbose=False), copy, ignore=shutil.ignore_patterns("lock"))
    (copy / "lock").touch()
    assert run_ranks(2, build_with_offload_in, tmp_path, timeout=200) == ["DeepSpeedCPUAdam"] * 2
    assert not (copy / "lock").exists()


def shared_memory_operator() -> object:
    from deepspeed import comm

    return comm.comm.cdb.shm_comm_op


def test_no_compiler_runs_at_a_start_without_offload() -> None:
    """DeepSpeed compiles its shared-memory all-reduce for CPUs at every first start, under torch's lock."""
    assert run_ranks(2, shared_memory_operator) == [None, None]
