"""The kernels' check runs with what a bare CUDA host has: torch, Triton and the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = '''
import sys

BLOCKED = {"deepspeed", "zstandard", "pydantic", "datasets", "wandb", "rich", "filelock", "xxhash", "transformers"}
BLOCKED |= {"tokenizers", "safetensors", "pyarrow", "matplotlib", "pynvml"}


class Absent:
    """Found first, for all that a bare host may lack."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}")


sys.meta_path.insert(0, Absent())
'''
ROWS = (
    "correct: bias_gelu N=3072",
    "speed: gather_rows",
    "correct: cast_fp8 N=768 e4m3",
    "sanitizer racecheck",
    "model: base S=128",
)


def test_without_anything_but_torch(tmp_path: Path) -> None:
    """In the parent, its worker and what these start: sitecustomize blocks the imports in all of them."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    blocked = subprocess.run(
        [sys.executable, "-c", "import zstandard"], env=environment, capture_output=True, text=True
    )
    assert "blocked: zstandard" in blocked.stderr
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--session", "--only", *ROWS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    records = {record["row"]: record for record in map(json.loads, (tmp_path / "out" / "session.jsonl").open())}
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(records) >= {
        "environment",
        "compilation",
        "rates",
        "correct: cast_fp8 N=768 e4m3",
        "sanitizer racecheck",
    }
    assert records["compilation"]["failed"] == []
    skipped = {name for name, record in records.items() if "skipped" in record}
    assert skipped and all(name.startswith("model: ") for name in skipped)
