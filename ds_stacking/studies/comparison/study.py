"""A study: a list of comparisons that run as one plan, for days if need be, stopped and continued by one command.

A study is a JSON file, a list of comparisons in the order in which they run:

    [{"name": "docs", "options": ["--recipe=quickstart", "--tune", "--seeds=5"]}, ...]

Options are those of compare.py but --output_dir: each has a folder of its name in that of the study.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from ds_stacking.common.errors import UserError
from ds_stacking.common.files import write_text
from ds_stacking.common.json_files import read_json
from ds_stacking.common.outputs import writing
from ds_stacking.common.words import shown
from ds_stacking.studies.comparison.conclusion import summary_lines
from ds_stacking.studies.comparison.results import read_comparison
from ds_stacking.studies.comparison.shapes import PLAN

OWN = ("output_dir", "study", "task", "parallel", "launch")
"""Options of compare.py that hold for the whole study, or have no meaning in one."""


class Entry(TypedDict):
    """One comparison of a study."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]{0,63}$")]
    options: Annotated[list[str], Field(max_length=1000)]


def read_study(path: Path) -> dict[str, list[str]]:
    """Options of compare.py by the name of the comparison, in order. Raises UserError for what is no study."""
    try:
        entries = read_json(path, list[Entry], mend="mend it")
    except OSError as error:
        raise UserError(f"study {shown(str(path))} cannot be read ({error.strerror}); give a JSON file.") from None
    names = [entry["name"] for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not entries or twice:
        raise UserError(f"study {path} {'is empty' if not entries else f'has two comparisons {twice}'}; mend it.")
    for entry in entries:
        _check_options(path, entry["name"], entry["options"])
    return {entry["name"]: entry["options"] for entry in entries}


def write_study(folder: Path, names: Sequence[str]) -> str:
    """Write `folder`/study.md, the first line of each comparison's conclusion; returns it as text."""
    there = [read_comparison(folder / name) for name in names if (folder / name / PLAN).exists()]
    text = "\n".join(summary_lines(there))
    with writing(folder):
        write_text(folder / "study.md", f"{text}\n", inside=folder)
    return text


def _check_options(path: Path, name: str, options: Sequence[str]) -> None:
    for option in options:
        found = re.match(r"--(\w+)", option)
        if found and found[1] in OWN:
            raise UserError(
                f"study {path}: {name} gives --{found[1]}, which is one for the whole study; leave it out."
            )
