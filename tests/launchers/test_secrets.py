"""A run with keys in its environment: none of them is written or printed anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.corpus import small_options, write_corpus

ROOT = Path(__file__).parents[2]
SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef", "HF_TOKEN": "hf_" + "Zq9" * 11 + "x"}


def holders(folder: Path, secret: bytes) -> list[Path]:
    """Files below `folder` that contain a secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_no_key_is_written_or_printed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    options = [*small_options(tmp_path), "--stages=1:4,2:4"]
    done = subprocess.run(
        [sys.executable, "launchers/pretrain.py", *options],
        cwd=ROOT,
        env=os.environ | SECRETS | {"WANDB_MODE": "offline", "TMPDIR": str(tmp_path)},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")), "wandb took part"
    for secret in map(str.encode, SECRETS.values()):
        assert secret not in done.stdout + done.stderr
        assert holders(tmp_path, secret) == []
    (tmp_path / "run" / "leak").write_bytes(b"x" + secret)
    assert holders(tmp_path, secret) == [tmp_path / "run" / "leak"]
