"""The battery finds what it is for: with a mend taken out, cases of it fail that pass otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from tests.hostile import taken_out
from tests.hostile.rules import DEEP
from tests.hostile.test_files import on
from tests.hostile.test_links import plant
from tests.hostile.world import PREPARE, World


def test_links_that_are_followed_again_are_found(world: World) -> None:
    """A report is written through a link, over a file elsewhere."""
    for without, expected in ((None, False), (taken_out.follow_links, True)):
        plant(world.work / "run" / "report", world.root / "outside" / "folder")
        faults = world.faults("dashboard.py", "run", without=without)
        assert ("changes outside" in "\n".join(faults)) == expected, faults
        world.restore()


@pytest.mark.parametrize("content", ["[1]", '{"growths": 3}', "[" * DEEP])
def test_json_that_is_believed_again_is_found(world: World, content: str) -> None:
    """Fields of other types and endless nesting end in exceptions that have no sentence of their own."""
    for without, expected in ((None, False), (taken_out.believe_json, True)):
        (world.work / "finished" / "summary.json").write_text(content)
        faults = world.faults("dashboard.py", "finished", without=without)
        assert ("no sentence of its own" in "\n".join(faults)) == expected, faults
        world.restore()


@pytest.mark.slow
def test_lines_without_an_end_are_found(world: World) -> None:
    """A hundred kilobytes become a line of a gigabyte."""
    bomb = bomb_of(world.work / "bomb.txt.zst", gigabytes=1)
    command = ("prepare_data.py", f"--data={bomb.name}", "--output_dir=fresh", *PREPARE)
    for without, expected in ((None, False), (taken_out.read_lines_whole, True)):
        outcome = world.run(*command, without=without)
        assert bool(outcome.faults()) == expected, str(outcome)
    assert (world.work / "fresh").exists() or outcome.code != 0


def test_paths_out_of_the_folder_are_refused(world: World) -> None:
    """A shard by the name of ../other is another folder's."""
    path = world.work / "prepared" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["shards"] == ["shard-00000"]
    path.write_text(json.dumps(manifest | {"shards": ["../other/shard-00000"]}))
    outcome = world.run(*on("prepared"))
    assert outcome.code == 2 and not outcome.faults() and "../other" in outcome.sentences[0], str(outcome)


def bomb_of(path: Path, gigabytes: int) -> Path:
    """A file of Zstandard that is a letter, many times, without an end of a line."""
    compressor = zstandard.ZstdCompressor(level=19)
    with path.open("wb") as file, compressor.stream_writer(file) as stream:
        for _ in range(gigabytes << 4):
            stream.write(b"x" * (1 << 26))
    return path
