"""GLUE's files: all layouts, the hub's rows alike, and what is said of torn, missing and wrong ones."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.studies.glue import task_data as glue_data
from ds_stacking.studies.glue.task_data import load_task
from ds_stacking.studies.glue.tasks import TASKS, select_tasks
from tests.studies.glue.glue_files import BAD, GOOD, LABELS, write_task


@pytest.mark.parametrize("name", TASKS)
def test_every_layout_is_read(tmp_path: Path, name: str) -> None:
    write_task(tmp_path, name)
    task = TASKS[name]
    data = load_task(task, str(tmp_path))
    assert len(data.train) == 64 and data.dev.keys() == task.dev.keys() and data.notes == []
    assert all(len(split) == 24 and len(split.texts) == len(task.columns) for split in data.dev.values())
    low, high = LABELS.get(name, ("0", "1"))
    values = [float(low), float(high)] if task.regression else [task.labels.index(low), task.labels.index(high)]
    for text, label in zip(data.train.texts[0], data.train.labels, strict=True):
        assert any(word in text for word in (GOOD if label == values[1] else BAD))
        assert text.startswith('" ')
    assert data.test.keys() == task.test.keys()
    for split in data.test.values():
        assert split.ids == [str(10 + i) for i in range(5)] and split.labels == []


def test_the_hub_gives_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path, "MNLI")
    task = TASKS["MNLI"]
    own = load_task(task, str(tmp_path))

    def rows(split) -> datasets.Dataset:
        columns = dict(zip(task.hub_columns, split.texts, strict=True))
        return datasets.Dataset.from_dict(
            {**columns, "label": [int(x) for x in split.labels] or [-1] * len(split), "idx": list(range(len(split)))}
        )

    def load_dataset(name: str, config: str) -> dict:
        assert name == "some/glue"
        if config == "ax":
            return {"test": rows(own.test["AX"])}
        return {
            "train": rows(own.train),
            **{f"validation_{x}": rows(own.dev[y]) for x, y in (("matched", "m"), ("mismatched", "mm"))},
            **{f"test_{x}": rows(own.test[f"MNLI-{y}"]) for x, y in (("matched", "m"), ("mismatched", "mm"))},
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = load_task(task, "some/glue")
    assert hub.train == own.train and hub.dev == own.dev
    assert {name: split.texts for name, split in hub.test.items()} == {n: s.texts for n, s in own.test.items()}
    assert hub.test["AX"].ids == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match="no 'sentence1' for RTE"):
        load_task(TASKS["RTE"], "some/glue")
    own.train.labels[7] = 3
    with pytest.raises(UserError, match="Row 7 of the hub's mnli has the label 3; it must be 0 to 2"):
        load_task(task, "some/glue")


def edit(path: Path, number: int, line: str) -> None:
    lines = path.read_text().split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines))


def test_a_torn_line_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "RTE")
    edit(folder / "train.tsv", 5, "3\tonly two")
    data = load_task(TASKS["RTE"], str(tmp_path))
    assert len(data.train) == 63
    (note,) = data.notes
    assert "train.tsv" in note and "line 5" in note and "1 of 64" in note


@pytest.mark.parametrize(
    ("task", "file", "line", "text", "message"),
    [
        ("RTE", "dev.tsv", 3, "1\ta\tb\tmaybe", r"dev.tsv line 3: the label 'maybe' is none of entailment, not"),
        ("SST-2", "train.tsv", 9, "a film\t2", "line 9: the label '2'"),
        ("STS-B", "train.tsv", 2, "0\tnews\ta\tb\t5.1", r"line 2: the score '5.1' is no number from 0 to 5"),
        ("STS-B", "train.tsv", 2, "0\tnews\ta\tb\tnan", "line 2: the score 'nan'"),
        ("RTE", "test.tsv", 2, "10\ttorn", "a submission needs every row"),
        ("RTE", "dev.tsv", 3, "1\ta\tb\t" + "x" * 10_000, r"the label 'xxx.*[.]{3} is none of"),
        ("RTE", "dev.tsv", 3, "1\ta\0\tb\tentailment", "line 3 holds a NUL"),
        ("RTE", "dev.tsv", 1, "index\tsentence1\tsentence1\tsentence2\tlabel", "names twice the column 'sentence1'"),
        ("RTE", "dev.tsv", 1, "index\tpremise\thypothesis\tlabel", "has no column 'sentence1'"),
    ],
)
def test_wrong_lines_are_one_sentence(
    tmp_path: Path, task: str, file: str, line: int, text: str, message: str
) -> None:
    edit(write_task(tmp_path, task) / file, line, text)
    with pytest.raises(UserError, match=message):
        load_task(TASKS[task], str(tmp_path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder RTE"):
        load_task(TASKS["RTE"], str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_task(TASKS["RTE"], str(tmp_path / "nowhere"))
    folder = write_task(tmp_path, "RTE")
    (folder / "test.tsv").unlink()
    data = load_task(TASKS["RTE"], str(tmp_path))
    assert data.test == {} and "no test file for RTE" in data.notes[0]
    (folder / "train.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *["torn\tline"] * 20]))
    with pytest.raises(UserError, match="20 of 20 lines"):
        load_task(TASKS["RTE"], str(tmp_path))
    (folder / "train.tsv").write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\ta\xff\tb\tentailment\n")
    with pytest.raises(UserError, match="no UTF-8"):
        load_task(TASKS["RTE"], str(tmp_path))
    (folder / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(UserError, match="no examples"):
        load_task(TASKS["RTE"], str(tmp_path))


def test_labels_of_test_sets_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    for name in ("SST-2", "MNLI"):
        folder = write_task(tmp_path, name)
        for path in folder.glob("test*.tsv"):
            header, *lines = path.read_text().splitlines()
            labels = ["entailment", "neutral"] if name == "MNLI" else ["1", "0"]
            labelled = [f"{line}\t{labels[i % 2]}" for i, line in enumerate(lines)]
            path.write_text("\n".join([f"{header}\t{TASKS[name].label_column}", *labelled]) + "\n")
        silent = load_task(TASKS[name], str(tmp_path))
        loud = load_task(TASKS[name], str(tmp_path), test_labels=True)
        for test, split in loud.test.items():
            alternating = [0, 1, 0, 1, 0] if name == "MNLI" else [1, 0, 1, 0, 1]
            assert split.labels == ([] if test == "AX" else alternating)
            assert silent.test[test].labels == [] and silent.test[test].texts == split.texts
            assert silent.test[test].ids == split.ids


def test_labels_that_test_sets_lack_are_one_sentence(tmp_path: Path) -> None:
    path = write_task(tmp_path, "RTE") / "test.tsv"
    with pytest.raises(UserError, match="test.tsv has no column 'label'.* and with --test_labels that of the labels"):
        load_task(TASKS["RTE"], str(tmp_path), test_labels=True)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{header}\tlabel", *(f"{line}\t-1" for line in lines)]))
    with pytest.raises(UserError, match="test.tsv line 2: the label '-1' is none of entailment"):
        load_task(TASKS["RTE"], str(tmp_path), test_labels=True)
    path.unlink()
    with pytest.raises(UserError, match="--test_labels: .*test.tsv is missing; add it, or leave"):
        load_task(TASKS["RTE"], str(tmp_path), test_labels=True)
    with pytest.raises(UserError, match="hub's test sets have no labels"):
        load_task(TASKS["RTE"], "some/glue", test_labels=True)


def test_tasks_are_found_by_name() -> None:
    assert [task.name for task in select_tasks("sst2,RTE,sst_2")] == ["SST-2", "RTE"]
    assert len(select_tasks("all")) == 9
    with pytest.raises(UserError, match="did you mean MNLI"):
        select_tasks("MNL")


def test_labels_are_numbered_as_on_the_hub() -> None:
    """nyu-mll/glue: entailment 0, neutral 1, contradiction 2; entailment 0, not_entailment 1."""
    assert TASKS["MNLI"].labels == ("entailment", "neutral", "contradiction")
    assert {TASKS[name].labels for name in ("QNLI", "RTE")} == {("entailment", "not_entailment")}
    assert {TASKS[name].labels for name in ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")} == {("0", "1")}


def test_tables_of_other_encodings_and_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_task(tmp_path, "RTE") / "train.tsv"
    text = path.read_text()
    for content, message in (
        (text.encode("utf-16"), "train.tsv line 1 is no UTF-8 text"),
        (text.replace("film", "f\xeflm").encode("latin-1"), "is no UTF-8 text"),
        (b"", "has no column 'sentence1'"),
        (b"\n\n", "has no column 'sentence1'"),
        (text.encode().split(b"\n")[0], "holds no examples"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_task(TASKS["RTE"], str(tmp_path))
    path.write_text(text)
    with path.open("ab") as file:
        file.truncate(10**9)  # a hole: no disk is filled
    with pytest.raises(UserError, match="line 66 of .*train.tsv has more than 1,048,576 bytes"):
        load_task(TASKS["RTE"], str(tmp_path))
    path.write_text(text)
    monkeypatch.setattr(glue_data, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="train.tsv has more than 1,000 bytes"):
        load_task(TASKS["RTE"], str(tmp_path))


def test_blank_lines_and_the_ends_of_windows_are_no_fault(tmp_path: Path) -> None:
    path = write_task(tmp_path, "RTE") / "train.tsv"
    plain = load_task(TASKS["RTE"], str(tmp_path)).train
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert load_task(TASKS["RTE"], str(tmp_path)).train == plain


@pytest.mark.parametrize("name", ["file", "a b", "x" * 200, "none/of/these", "/absent"])
def test_sources_that_are_no_folder_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match="is no folder|does not exist"):
        load_task(TASKS["RTE"], name)
