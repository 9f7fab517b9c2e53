"""Words that nobody takes end no program, and are written into no file that it has open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import os, sys
from ds_stacking.common.streams import keep_streams
keep_streams()
keep_streams()
file = open(sys.argv[1], "wb", buffering=0)
for _ in range(2000):
    print("a word with \\udce9 in it" * 5, flush=True)
print("error", file=sys.stderr)
os.write(1, b"as a library does") if sys.argv[2] == "closed" else None
file.write(b"data")
"""


@pytest.mark.parametrize(
    ("case", "shell"),
    [
        ("closed", '"$@" >&-'),
        ("closed", '"$@" >&- 2>&- <&-'),
        ("no reader", 'set -o pipefail; "$@" | head -n 1 >/dev/null'),
        ("a full disk", '"$@" >/dev/full 2>/dev/full'),
        ("ASCII", 'export PYTHONIOENCODING=ascii; "$@" >/dev/null'),
    ],
)
def test_the_program_goes_on(tmp_path: Path, case: str, shell: str) -> None:
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", CODE, str(tmp_path / "file"), case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert (tmp_path / "file").read_bytes() == b"data"
