"""Golden losses: a refactor reproduces them to the bit.

To record them anew after an intended change: python -m tests.training.test_golden
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from ds_stacking.command_line import parse_run
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

GOLDEN = Path(__file__).with_name("golden_losses.json")


def this_machine() -> dict[str, str]:
    """What decides the last bits: the CPU, the kernels chosen for it, and PyTorch."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model" in line]
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": " ".join(names[:2]),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }


def run(folder: str) -> list[float]:
    """Training and held-out losses of a run through two growths, dropout on, one rank, one thread."""
    from ds_stacking.training.run import pretrain

    pretrain(parse_run([*small_options(Path(folder)), "--tracking=none", "--deepspeed_config=ds_configs/zero2.json"]))
    records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record.get("loss", record.get("eval_loss")) for record in records if record["kind"] in ("train", "eval")]


@pytest.mark.distributed
def test_losses_are_the_recorded_ones(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    losses = run_ranks(1, run, str(tmp_path))[0]
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] == this_machine():
        assert losses == golden["losses"]
    else:
        assert losses == pytest.approx(golden["losses"], rel=1e-5)


if __name__ == "__main__":
    import os
    import tempfile

    os.environ["OMP_NUM_THREADS"] = "1"  # as in tests/conftest.py: the variable alone moves last bits
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name) / "corpus")
        recorded = run_ranks(1, run, name)[0]
    GOLDEN.write_text(json.dumps({"machine": this_machine(), "losses": recorded}, indent=1) + "\n")
