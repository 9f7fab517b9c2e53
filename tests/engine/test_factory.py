"""Starting engines where a killed process left torch's compilation lock behind; the time limit of collective calls."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import _get_build_directory

from ds_stacking.engine import factory
from ds_stacking.engine.factory import native_bf16
from tests.device_strict.double import strict_device
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


def late_partner(group: str) -> float:
    """Seconds after which a rank whose partner does not come gives up, with a limit of one second."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    from ds_stacking.engine.factory import init_distributed

    init_distributed(limit=timedelta(seconds=1))
    begin = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
            dist.all_reduce(torch.ones(1), group={"default": None, "DeepSpeed's": groups._clone_world_group()}[group])
        dist.distributed_c10d._get_default_store().set("given up", "")
        raise TimeoutError(f"given up after {time.monotonic() - begin:.1f} s")
    dist.distributed_c10d._get_default_store().wait(["given up"])
    time.sleep(5)
    return 0.0


@pytest.mark.parametrize("group", ["default", "DeepSpeed's"])
def test_a_collective_call_ends_at_our_limit(group: str) -> None:
    with pytest.raises(AssertionError, match=r"given up after [12]\.\d s"):
        run_ranks(2, late_partner, group, timeout=120)


def test_bf16_is_native_only_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch emulates it on GPUs before Ampere; and no rank looks at another's GPU."""
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(torch.cuda.current_device())
        return including_emulation

    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(factory, "check_device", lambda: None)  # the double is one GPU alone
    with strict_device(0):
        assert native_bf16() == (False, "double of a GPU")
    assert asked == [2]
