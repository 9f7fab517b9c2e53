"""What launchers say in the environment: wrong numbers are named before anything relies on them."""

from __future__ import annotations

import pytest

from ds_stacking.common import environment
from ds_stacking.common.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def set_all(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_one_process_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch)
    environment.check_environment()
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (0, 1, 0)
    assert environment.local_world_size() == 1


def test_ranks_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, RANK="9", WORLD_SIZE="16", LOCAL_RANK="1", LOCAL_SIZE="8", LOCAL_WORLD_SIZE="")
    environment.check_environment()
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (9, 16, 1)
    assert environment.local_world_size() == 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "abc"}, "RANK is 'abc'; it must be a whole number from 0 up"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1.5", "WORLD_SIZE": "2"}, "RANK is '1.5'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number from 1 up"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 2 and WORLD_SIZE 2; ranks count from 0"),
        ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE 1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set: which GPU"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_SIZE": "none"}, "LOCAL_SIZE is 'none'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
    ],
)
def test_wrong_numbers_are_named(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], words: str) -> None:
    set_all(monkeypatch, **values)
    with pytest.raises(UserError, match=words):
        environment.check_environment()
