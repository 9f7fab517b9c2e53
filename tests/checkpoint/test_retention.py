"""Which checkpoints stay, and that nothing goes before its successor is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_stacking.checkpoint.select import newest_valid
from tests.checkpoint.stores import IDENTITY, equal, random_state, save, stored


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path, keep) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
        assert steps(tmp_path) == [f"step-{s}" for s in range(max(1, step - keep + 1), step + 1)]


def test_the_ends_of_stages_stay(tmp_path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, always=step in (1, 3))
    assert steps(tmp_path) == ["step-1", "step-3", "step-5", "step-6"]


def test_damaged_ones_do_not_count(tmp_path) -> None:
    """A newer one that is damaged is no reason to delete an older one that is whole."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    os.truncate(tmp_path / "step-2" / "rank-00000.safetensors", 10)
    (tmp_path / "step-3" / "manifest.json").unlink()
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == ["step-1", "step-2", "step-3", "step-4"]
    save(tmp_path, 5, keep=2)
    assert steps(tmp_path) == ["step-3", "step-4", "step-5"], "what has no manifest is not ours to delete"


def test_the_same_step_again_leaves_the_old_one_until_the_new_one_stands(tmp_path) -> None:
    old, new = random_state(10), random_state(11)
    save(tmp_path, 1, old)
    save(tmp_path, 1, new, keep=2)
    assert steps(tmp_path) == ["step-1-2"]
    found = newest_valid(tmp_path, IDENTITY)
    assert found.step == 1 and equal(stored(found.path), new)
    save(tmp_path, 1, old, keep=2)
    assert steps(tmp_path) == ["step-1"] and equal(stored(tmp_path / "step-1"), old)


def test_a_damaged_one_of_the_same_step_is_no_obstacle(tmp_path) -> None:
    save(tmp_path, 1), save(tmp_path, 2)
    os.truncate(tmp_path / "step-2" / "manifest.json", 0)
    save(tmp_path, 2, random_state(5))
    found = newest_valid(tmp_path, IDENTITY)
    assert found.path.name == "step-2-2" and equal(stored(found.path), random_state(5))


def test_a_run_that_went_back_overtakes_what_it_left_behind(tmp_path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step)
    save(tmp_path, 150)  # resumed by hand from step 100
    assert newest_valid(tmp_path, IDENTITY).step == 150
