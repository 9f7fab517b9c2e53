"""Two nodes that see other files: what one rank refuses ends the other too, within seconds, each with one sentence."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import small_options, write_corpus

ROOT = Path(__file__).parents[2]


def start(node: Path, rank: int, port: int, *options: str) -> subprocess.Popen:
    """A rank whose working directory is that of its node."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), *options]
    return subprocess.Popen(
        command, cwd=node, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "absent"),
    [
        (1, "corpus"),
        (0, "ds.json"),
        pytest.param(0, "corpus", marks=pytest.mark.slow),
        pytest.param(1, "ds.json", marks=pytest.mark.slow),
    ],
)
def test_what_one_node_lacks_ends_both(tmp_path: Path, absent: str, rank: int) -> None:
    nodes = [tmp_path / "0", tmp_path / "1"]
    for node in nodes:
        write_corpus(node / "corpus")
        shutil.copy(ROOT / "ds_configs" / "zero1.json", node / "ds.json")
    lacking = nodes[rank] / absent
    shutil.rmtree(lacking) if lacking.is_dir() else lacking.unlink()
    options = [*small_options(Path(".")), "--deepspeed_config=ds.json", "--tracking=none"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(node, number, port, *options) for number, node in enumerate(nodes)]
    try:
        ends = [process.communicate(timeout=240) for process in ranks]  # the default limit of a call is half an hour
    finally:
        for process in ranks:
            process.kill()
    assert ranks[rank].returncode == 2 and ranks[1 - rank].returncode == 1, ends
    said = [err for _, err in ends]
    assert absent in said[rank] and said[rank].count("error: ") == 1, said
    assert f"rank {rank} " in said[1 - rank] and "Traceback" not in "".join(said), said
    assert not any((node / "run").exists() for node in nodes)
