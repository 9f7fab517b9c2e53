"""Runs and options that are damaged or made up, for attention maps: one sentence names file and field."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_stacking.command_line import parse_options
from ds_stacking.common.errors import UserError
from ds_stacking.studies.attention.configuration import AttentionConfig
from ds_stacking.studies.attention.run import analyse
from ds_stacking.studies.attention.subject import resolve
from tests.studies.attention.test_attention import write_run


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def config(**fields: Any) -> Callable[[Path], None]:
    def mutate(run: Path) -> None:
        content = json.loads((run / "config.json").read_text()) | fields
        (run / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return mutate


def event(**fields: Any) -> Callable[[Path], None]:
    def mutate(run: Path) -> None:
        first, growth = (run / "metrics.jsonl").read_text().splitlines()
        content = json.loads(growth) | fields
        growth = json.dumps({k: v for k, v in content.items() if v is not ...})
        (run / "metrics.jsonl").write_text(f"{first}\n{growth}\n")

    return mutate


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(content)


def linked(name: str) -> Callable[[Path], None]:
    def mutate(run: Path) -> None:
        os.rename(run / name, run.parent / "elsewhere")
        (run / name).symlink_to(run.parent / "elsewhere")

    return mutate


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config is empty": (text("config.json", ""), "run/config.json .*is no JSON"),
    "config is deep": (text("config.json", "[" * 100_000), "run/config.json .*is no JSON"),
    "config is a list": (text("config.json", "[]"), "run/config.json .*an object"),
    "config is a link": (linked("config.json"), "run/config.json is a link"),
    "no data": (config(data=...), "run/config.json .*data: field required"),
    "data is a list": (config(data=[]), "run/config.json .*data: "),
    "no corpus": (config(corpus=...), "run/config.json .*corpus: field required"),
    "corpus is text": (config(corpus="x"), "run/config.json .*corpus: "),
    "a length that is text": (config(corpus={"sequence_length": "x"}), "run/config.json .*corpus.sequence_length: "),
    "metrics is a link": (linked("metrics.jsonl"), "run/metrics.jsonl is a link"),
    "a line that is no JSON": (text("metrics.jsonl", '{"growth"\n'), "metrics.jsonl line 1 .*is no JSON"),
    "a line that is deep": (
        text("metrics.jsonl", '"growth"' + "[" * 99_999 + "\n"),
        "metrics.jsonl line 1 .*is no JSON",
    ),
    "a line that is a list": (text("metrics.jsonl", '["growth"]\n'), "metrics.jsonl line 1 .*an object"),
    "a line without end": (text("metrics.jsonl", "x" * (1 << 23)), "metrics.jsonl line 1 has more than"),
    "a growth without map": (event(layer_map=...), "metrics.jsonl line 2 .*layer_map: field required"),
    "a growth of text": (event(layer_map="00"), "metrics.jsonl line 2 .*layer_map: "),
    "a growth from -1": (event(layer_map=[0, -1]), "metrics.jsonl line 2 .*layer_map.1: "),
    "a growth from 7": (event(layer_map=[0, 7]), "a growth at stage 2 that does not lead"),
    "a growth of 3": (event(layer_map=[0, 0, 0]), "a growth at stage 2 that does not lead"),
    "a growth to 4": (event(to_layers=4), "a growth at stage 2 that does not lead"),
    "a stage of text": (event(stage="1"), "metrics.jsonl line 2 .*stage: "),
    "an operator that is a number": (event(operator=5), "metrics.jsonl line 2 .*operator: "),
    "export is a link": (linked("export"), "run/export is a link"),
    "a stage that is a link": (linked("export/stage-1-1L"), "stage-1-1L is a link"),
    "report is a link": (
        lambda run: ((run.parent / "elsewhere").mkdir(), (run / "report").symlink_to(run.parent / "elsewhere")),
        "run/report is a link",
    ),
    "report is a file": (text("report", ""), "output_dir .* cannot be made: .*report is no folder"),
    "a stage of another depth": (
        lambda run: shutil.copytree(run / "export" / "stage-2-2L", run / "export" / "stage-1-1L", dirs_exist_ok=True),
        "stage-1-1L has 2 layers",
    ),
    "a tokenizer that is a link": (linked("export/stage-1-1L/tokenizer.json"), "tokenizer.json is a link"),
    "a tokenizer that is empty": (
        text("export/stage-1-1L/tokenizer.json", "{}"),
        "-1L.tokenizer.json is damaged",
    ),
    "a tokenizer that is deep": (text("export/stage-1-1L/tokenizer.json", "[" * 100_000), "tokenizer.json is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_and_nothing_is_written(run: Path, fault: str) -> None:
    mutate, words = FAULTS[fault]
    mutate(run)
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        analyse(AttentionConfig(model=str(run), sequences=2))
    said = str(error.value)
    assert re.search(words, said) and "\n" not in said and len(said) < 700, said
    assert sorted(run.parent.rglob("*")) == before


def test_foreign_entries_and_half_a_line_are_passed_over(run: Path) -> None:
    for name in ("stage-x", "stage-9", "stage-1-1L.bak", ".stage-1-1L.0123456789abcdef.tmp"):
        (run / "export" / name).mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "growth", "stage"')
    subject = resolve(AttentionConfig(model=str(run)))
    assert list(subject.models) == ["stage-1-1L", "stage-2-2L"] and len(subject.growths) == 1


def test_a_growth_that_is_not_known_is_left_out(run: Path) -> None:
    """It was made on the disk."""
    (run / "metrics.jsonl").write_text('{"kind": "train"}\n')
    folder = analyse(AttentionConfig(model=str(run), sequences=2))
    assert json.loads((folder / "attention.json").read_text())["growths"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model="], "model is ''; it must name something"),
        (["--model= "], "model is ' '; it must name something"),
        ([], "--model is missing"),
        (["--model=m", "--tokenizer="], "tokenizer is ''"),
        (["--model=m", "--data="], "data is ''"),
        (["--model=m", "--output_dir="], "output_dir is ''"),
        (["--model=m", "--sequences=nan"], "sequences is nan; it must be a whole number"),
        (["--model=m", "--sequences=1e999"], "sequences is inf; it must be a whole number"),
        (["--model=m", "--sequences=-1"], "sequences is -1; it must be 1 to"),
        (["--model=m", f"--sequences={10**30}"], "sequences is 1e[+]30; it must be 1 to"),
        (["--model=m", f"--neighbours={10**30}"], "neighbours is 1e[+]30; it must be 1 to"),
        (["--model=m", "--sequence_length=7"], "sequence_length is 7; it must be 8 to"),
        (["--model=m", f"--sequence_length={10**12}"], "sequence_length is 1e[+]12; it must be 8 to"),
        (["--model=m", "--sequence_length=0.5"], "sequence_length is 0.5; it must be a whole number"),
    ],
)
def test_options_are_refused_in_one_sentence(options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse_options(AttentionConfig, options, "")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["file", "file/inner", "/nowhere/at/all", "~/nowhere"])
def test_a_model_that_is_no_folder(tmp_path: Path, model: str) -> None:
    (tmp_path / "file").write_text("")
    path = model if model[0] in "/~" else str(tmp_path / model)
    with pytest.raises(UserError, match="does not exist; give --model|cannot be loaded|no tokenizer|does not exist"):
        analyse(AttentionConfig(model=path, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
