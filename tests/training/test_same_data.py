"""Ranks whose data differ do not train: every rank says which nodes have which."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from ds_stacking.command_line import parse_run
from ds_stacking.common.errors import UserError
from tests.corpus import small_options, write_corpus
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def refused(folder: str, one_source: bool = False) -> str:
    """Rank 1 stands on a node of its own, with other files under the same name and a cache of its own."""
    from ds_stacking.training.run import pretrain

    node = "two" if os.environ["RANK"] == "1" else "one"
    socket.gethostname = lambda: f"node-{node}"
    os.chdir(Path(folder) / ("one" if one_source else node))
    options = [
        *small_options(Path(folder)),
        "--tokens_per_step=576",
        "--data=corpus",
        f"--corpus.cache_dir={folder}/{node}/cache",
    ]
    with pytest.raises(UserError) as error:
        pretrain(
            parse_run(
                [*options, "--tracking=none", f"--deepspeed_config={Path(__file__).parents[2]}/ds_configs/zero2.json"]
            )
        )
    return str(error.value)


def test_a_copy_that_differs_is_named_though_it_has_the_same_manifest(tmp_path: Path) -> None:
    """Half of a token file was not copied, into a file of the right size."""
    write_corpus(tmp_path / "one" / "corpus")
    prepared = [tmp_path / node / "cache" for node in ("one", "two")]
    run_ranks(1, prepare_here, str(tmp_path), str(prepared[0]))
    shutil.copytree(prepared[0], prepared[1])
    (tokens,) = prepared[1].glob("*/shard-00000/train.bin")
    content = tokens.read_bytes()
    tokens.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    said = run_ranks(3, refused, str(tmp_path), True)
    assert said[0] == said[1] == said[2] and " on node-two; let them share" in said[0]


def prepare_here(folder: str, cache: str) -> None:
    from ds_stacking.data.preparation.prepare import prepare

    os.chdir(Path(folder) / "one")
    config = parse_run([*small_options(Path(folder)), "--data=corpus", f"--corpus.cache_dir={cache}"])
    prepare(config.data, config.tokenizer, config.corpus, log=print)


def test_a_node_with_other_data_is_named_on_every_rank(tmp_path: Path) -> None:
    write_corpus(tmp_path / "one" / "corpus")
    write_corpus(tmp_path / "two" / "corpus", documents=239)
    said = run_ranks(3, refused, str(tmp_path))
    assert said[0] == said[1] == said[2]
    assert "from corpus: " in said[0] and " on node-one, " in said[0] and " on node-two; let them share" in said[0]
    assert not (tmp_path / "run").exists()
