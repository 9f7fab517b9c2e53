"""The battery finds what it is for: with a mend taken out, cases of it fail."""

from __future__ import annotations

import json

from tests.hostile import taken_out
from tests.hostile.rules import DEEP
from tests.hostile.test_files import GROW_MODEL, RESUME, on
from tests.hostile.test_links import plant
from tests.hostile.world import World


def test_links_that_are_followed_again_are_found(world: World) -> None:
    """A report is written through a link, over a file elsewhere."""
    plant(world.work / "run" / "report", world.root / "outside" / "folder")
    assert not world.faults("dashboard.py", "run")
    world.restore()
    plant(world.work / "run" / "report", world.root / "outside" / "folder")
    faults = world.faults("dashboard.py", "run", without=taken_out.follow_links)
    assert "changes outside" in "\n".join(faults)


def test_paths_out_of_the_folder_are_found(world: World) -> None:
    """A shard by the name of ../other is another folder's, and is read where nobody minds."""
    manifest = json.loads((world.work / "prepared" / "manifest.json").read_text())
    manifest["shards"] = {f"../other/{name}": facts for name, facts in manifest["shards"].items()}
    (world.work / "prepared" / "manifest.json").write_text(json.dumps(manifest))
    outcome = world.run(*on("prepared"))
    assert outcome.code == 2 and not outcome.faults() and "../other" in outcome.sentences[0], str(outcome)


def test_json_that_is_believed_again_is_found(world: World) -> None:
    """Fields of other types and endless nesting end in exceptions that have no sentence."""
    for content in ("[]", '{"newest": 3}', "[" * DEEP):
        (world.work / "run" / "saved.json").write_text(content)
        script, *options = RESUME
        assert not world.faults(script, *options, mutated=world.work / "run" / "saved.json")
        world.restore()
    (world.work / "model" / "config.json").write_text('{"model_type": "bert"}')
    script, *options = GROW_MODEL
    assert not world.faults(script, *options)
    faults = world.faults(script, *options, without=taken_out.believe_json)
    assert faults
