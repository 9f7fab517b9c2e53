"""Kernels compiled beforehand are found by the JIT: its own launch of them asks for the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib
import sys

import torch
from triton.runtime.driver import driver

from benchmarks.gpu_check import catalogue, precompile
from benchmarks.gpu_check.catalogue import Machine
from benchmarks.gpu_check.sanitizer import small_rows
from ds_stacking.kernels._launch import Executor, executing

NAMES = ("correct: gather and scatter", "correct: add_layer_norm N=768 pre-LN p=0.1", "correct: attention S=129 p=0.1")
NAMES += ("watched: attention whole heads p=0.1", "watched: attention queries, keys p=0.1")
chosen = [row for row in [*catalogue.rows(), *small_rows()] if row.name in NAMES]
assert len(chosen) == len(NAMES)


class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args):
        return 1, 1, 32, 0, 1024


class Loading(precompile.StandIn):
    '''A driver that also loads and launches, as far as the JIT can tell.'''

    utils = Utilities()
    launched = 0

    def launcher_cls(self, source, metadata):
        def launch(*args):
            type(self).launched += 1
        return launch

    def get_device_interface(self):
        return torch.cpu


class Every(Executor):
    '''Launches on CPU tensors as on a GPU, in every configuration.'''

    everywhere = True

    def __call__(self, launch):
        for config in launch.candidates("sm_90"):
            self.run(launch, config)


def launch_all() -> None:
    for name in ("add_layer_norm", "attention"):  # as on the GPU
        importlib.import_module(f"ds_stacking.kernels.{name}").multiprocessors = lambda device: 132
    driver.set_active(Loading())
    at = Machine(device="cpu", dtype=torch.bfloat16, small=True)
    with executing(Every()):
        for row in chosen:
            function, inputs = row.ours(at)
            out = function(*inputs)
            outputs = [out] if isinstance(out, torch.Tensor) else list(out)
            torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    print(Loading.launched)


if sys.argv[1] == "launch":
    launch_all()
else:
    todo, failed = precompile.tasks(chosen, catalogue.on_meta(dry=False, small=True))
    assert not failed, failed
    failed = precompile.compile_all(todo[: len(todo) - int(sys.argv[2])], 2)
    assert not failed, failed
    print(len(todo))
"""


def program(cache: Path, *arguments: str) -> tuple[int, set[str]]:
    """Run it with Triton's cache in `cache`: what it printed, and which entries the cache then has."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout), {path.name for path in cache.iterdir()}


def test_the_jit_finds_what_was_compiled_beforehand(tmp_path: Path) -> None:
    left_out = 2
    compiled, before = program(tmp_path, "compile", str(left_out))
    launched, after = program(tmp_path, "launch")
    assert launched >= compiled > 10
    assert len(after - before) == left_out  # what was left out is compiled anew, so it would be seen; nothing else is
