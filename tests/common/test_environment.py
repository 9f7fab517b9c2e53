"""What launchers say in the environment: wrong numbers are named before anything relies on them."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from ds_stacking.common import environment
from ds_stacking.common.errors import UserError

NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "SLURM_RESTART_COUNT", "DS_STACKING_CACHE"),
)


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("OMP_NUM_THREADS", value) for value in ("x", "0", "-1", "4,x")),
        *(("CUDA_VISIBLE_DEVICES", value) for value in ("foo", "0;1", "0,")),
        *(("DS_ACCELERATOR", value) for value in ("foo", "CUDA", "cpu ")),
        *(("MASTER_PORT", value) for value in ("x", "0", "65536", "-1", "99999")),
        *(("SLURM_RESTART_COUNT", value) for value in ("x", "-1")),
    ],
)
def test_what_libraries_read_is_checked_first(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_all(monkeypatch, **{name: value})
    with pytest.raises(UserError, match=f"The environment variable {name} is '{value}'"):
        environment.check_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("OMP_NUM_THREADS", value) for value in ("", "1", "64", "4,2")),
        *(
            ("CUDA_VISIBLE_DEVICES", value)
            for value in ("", "0", "0,1,7", "-1", "GPU-8932f937-d72c", "MIG-GPU-89/1/0")
        ),
        *(("MASTER_PORT", value) for value in ("1", "29500", "65535")),
        *(("DS_ACCELERATOR", value) for value in ("cpu", "cuda")),
        ("SLURM_RESTART_COUNT", "3"),
    ],
)
def test_what_they_may_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_all(monkeypatch, **{name: value})
    environment.check_environment()


def test_a_rank_of_a_larger_run_knows_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, WORLD_SIZE="2", LOCAL_RANK="0")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and RANK is not set"):
        environment.check_environment()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ({}, "RANK is set, and MASTER_ADDR is not"),
        ({"MASTER_ADDR": "127.0.0.1"}, "RANK is set, and MASTER_PORT is not"),
        ({"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"}, "this node knows no such host"),
        ({"MASTER_ADDR": "a" * 300, "MASTER_PORT": "29500"}, "this node knows no such host"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, None),
    ],
)
def test_where_ranks_meet(monkeypatch: pytest.MonkeyPatch, place: dict[str, str], sentence: str | None) -> None:
    set_all(monkeypatch, RANK="0", **place)
    if sentence is None:
        environment.check_meeting_place()
    else:
        with pytest.raises(UserError, match=sentence):
            environment.check_meeting_place()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_all(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / ".cache" / "ds_stacking"
    monkeypatch.setenv("DS_STACKING_CACHE", "")
    assert environment.cache_folder() == tmp_path / ".cache" / "ds_stacking"
    monkeypatch.setenv("DS_STACKING_CACHE", str(tmp_path / "a"))
    assert environment.cache_folder() == tmp_path / "a" and environment.cache_folder("/b") == Path("/b")


def test_nobody_knows_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(UserError, match="cannot be found .*set corpus.cache_dir"):
        environment.cache_folder()
