"""A step waits for the device once: what of a step reads a value of it back is counted, and whose code it is.

On a CPU nothing waits, but what would wait on a GPU is called all the same: `_local_scalar_dense` (item, bool, int and
float of a tensor), shapes that depend on values, and copies between host and device that are not asked to go on alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_stacking.command_line import parse_run
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
STEPS = range(4, 10)
"""Steps that are counted: after the first ones, before the last, whose line is logged."""
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
COPIES = ("to", "cpu", "cuda", "copy_", "tolist")
CASES = [(zero, "bf16", 0) for zero in range(4)] + [(zero, "fp32", 0) for zero in range(4)] + [(2, "bf16", 3)]
"""ZeRO stage, precision, skip_above_sigma."""


ON_CPU_ONLY = "selected_attention"
"""The last block's attention without the fused kernels, which a GPU has; it lays rows out by their number."""


def place() -> tuple[str, str]:
    """Who called what waits, ours or DeepSpeed, and where."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        owner = (
            "deepspeed" if "/deepspeed/" in name else "ours" if name.startswith((f"{ROOT}/ds_", f"{ROOT}/k")) else ""
        )
        if owner and frame.f_code.co_name != ON_CPU_ONLY:
            return owner, f"{Path(name).name}:{frame.f_lineno}"
        if owner:
            return "cpu", ""
        frame = frame.f_back
    return "nobody", ""


class Reads(TorchDispatchMode):
    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or by_mask:
            self.found[place()] += 1
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = function.__name__ != "to" or any(isinstance(a, str | torch.device) for a in [*args, *kwargs.values()])
        if getattr(function, "__name__", "") in COPIES and moves and not kwargs.get("non_blocking"):
            owner, where = place()
            if owner == "ours":  # DeepSpeed's copies stay on one device
                self.found[owner, where] += 1
        return function(*args, **kwargs)


def count(folder: str, zero: int, precision: str, sigma: float) -> dict[str, Any]:
    """What waits in the steps of `STEPS`, per step, by owner; and our places."""
    from ds_stacking.training.run import pretrain

    found: Counter = Counter()

    def prepare(run: Any) -> None:
        for name, first in (("train_step", STEPS.start - 1), ("report", STEPS.start)):
            original = getattr(run, name)

            def watched(*args: Any, first: int = first, original: Any = original) -> None:
                if not first <= run.state.position.step < first + len(STEPS):
                    return original(*args)
                with Reads(found), Copies(found):
                    return original(*args)

            setattr(run, name, watched)

    options = [f"--output_dir={folder}/run-{zero}-{precision}-{sigma}", f"--precision={precision}", "--stages=2:12"]
    options += [f"--deepspeed_config=ds_configs/zero{zero}.json", f"--skip_above_sigma={sigma}", "--tracking=none"]
    options += ["--log_every=1000", "--eval_every=0", "--micro_batch_size=4", "--corpus.separate_documents"]
    pretrain(parse_run([*small_options(Path(folder)), *options]), on_built=prepare)
    total = {owner: sum(n for (o, _), n in found.items() if o == owner) for owner in ("ours", "deepspeed", "nobody")}
    per_step = {owner: number / len(STEPS) for owner, number in total.items()}
    return per_step | {"places": sorted(where for owner, where in found if owner == "ours")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synchronisation")
    write_corpus(folder / "corpus")
    return folder


@pytest.mark.parametrize(("zero", "precision", "sigma"), CASES)
def test_a_step_waits_once(folder: Path, zero: int, precision: str, sigma: float) -> None:
    counted = run_ranks(2, count, str(folder), zero, precision, sigma)[0]
    print(json.dumps({"zero_stage": zero, "precision": precision, "skip_above_sigma": sigma} | counted))
    # whether a step is taken: ours asks in engine/optimizers.py, under ZeRO 3 DeepSpeed's step does
    assert (counted["ours"], counted["deepspeed"]) == ((0, 1) if zero == 3 else (1, 0)), counted["places"]
    assert counted["nobody"] == 0
