"""JSON through a typed reader: whatever a file holds, one sentence names the file, the field and what was expected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import pytest
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.json_files import KEEP_OTHERS, Count, Finite, check_value, parse_json, read_json


class Growth(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    seconds: Finite


class Summary(TypedDict):
    __pydantic_config__ = KEEP_OTHERS  # type: ignore[misc]
    finished: bool
    step: Count
    growths: NotRequired[list[Growth]]


GOOD = '{"finished": true, "step": 3, "growths": [{"seconds": 0.5, "operator": "stack"}], "name": "a"}'


def read(path: Path, content: str | bytes) -> Summary:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_json(path, Summary, mend="restore it")


def test_fields_that_no_shape_names_are_kept(tmp_path: Path) -> None:
    found = read(tmp_path / "summary.json", GOOD)
    assert found["growths"] == [{"seconds": 0.5, "operator": "stack"}]
    assert found["name"] == "a"  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        ("[" * 100_000, "is no JSON .*recursion"),
        ('{"a":' * 100_000, "is no JSON .*recursion"),
        ("null", "its content: input should be an object, and is None"),
        ("{}", "finished: field required"),
        (GOOD.replace("true", '"yes"'), "finished: input should be a valid boolean, and is 'yes'"),
        (GOOD.replace("true", "1"), "finished: .*boolean, and is 1"),
        (GOOD.replace("3", "3.5"), "step: .*integer, and is 3.5"),
        (GOOD.replace("3", "-3"), "step: .*greater than or equal to 0, and is -3"),
        (GOOD.replace("3", "9" * 5000), "is no JSON .*out of range"),
        (GOOD.replace("0.5", "NaN"), "growths.0.seconds: .*finite number, and is nan"),
        (GOOD.replace("0.5", "1e999"), "growths.0.seconds: .*finite number, and is inf"),
        ('{"\\u001b[2J": 1, "finished": true, "step": 3, "growths": {"' + "y" * 5000 + '": 1}}', "growths: "),
        (GOOD.replace("0.5", '"' + "x" * 1000 + '"'), "growths.0.seconds: .* is 'xxx.*[.]{3};"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path / "summary.json", content)
    text = str(error.value)
    assert str(tmp_path / "summary.json") in text and text.endswith("; restore it.") and len(text) < 400


def test_links_are_followed_where_the_user_named_the_file_only(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere.json").write_text(GOOD)
    (tmp_path / "run" / "summary.json").symlink_to("../elsewhere.json")
    path = tmp_path / "run" / "summary.json"
    assert read_json(path, Summary, mend="restore it")["step"] == 3
    with pytest.raises(UserError, match="is a link"):
        read_json(path, Summary, mend="restore it", inside=tmp_path / "run")


def test_a_file_that_is_not_there_is_the_callers_affair(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", Summary, mend="restore it")


def test_a_long_key_is_shortened_and_no_code_for_a_terminal_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    path.write_text('{"\\u001b[2J' + "y" * 5000 + '": "x"}')
    with pytest.raises(UserError, match=r"x1b\[2Jyyy.*yyy: .*valid integer") as error:
        read_json(path, dict[str, int], mend="restore it")
    assert len(str(error.value)) < 400


@dataclass(kw_only=True)
class Point:
    """A record."""

    x: int
    name: str = ""


def test_a_dataclass_is_a_shape_too() -> None:
    assert parse_json('{"x": 3}', Point, where="here", mend="mend it") == Point(x=3)
    with pytest.raises(UserError, match="here is damaged .*x: .*valid integer.*; mend it"):
        parse_json('{"x": "three"}', Point, where="here", mend="mend it")


def test_a_value_that_was_read_already() -> None:
    assert check_value({"a": 1.5}, dict[str, Finite], where="here", mend="mend it") == {"a": 1.5}
    with pytest.raises(UserError, match="here is damaged or made up: a: .*finite number.*; mend it"):
        check_value({"a": float("inf")}, dict[str, Finite], where="here", mend="mend it")
