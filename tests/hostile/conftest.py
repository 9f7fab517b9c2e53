"""The world of the battery, made once for all of its tests in a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.world import World


@pytest.fixture(scope="session")
def the_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("hostile")
    return World(folder)


@pytest.fixture
def world(the_world: World) -> Iterator[World]:
    yield the_world
    the_world.restore()
