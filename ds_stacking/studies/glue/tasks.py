"""The tasks of GLUE: their columns, labels, metrics, files, and the published hyper-parameters.

The hyper-parameters are those of Gong et al. 2019; GLUE is Wang et al. 2019 (ICLR). Labels stand in the order in which
the hub numbers them, so that both sources give the same training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ds_stacking.common.errors import UserError
from ds_stacking.common.words import nearest, shown


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. The hyper-parameters are those of the published code of Gong et al. 2019 (reproduce_glue.sh)."""

    name: str
    """Its name and that of its folder."""
    hub: str
    """Its configuration of the hub's data set."""
    labels: tuple[str, ...] = ("0", "1")
    """Its classes; none for a score from 0 to 5."""
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    """Columns of the text in the TSV files: one sentence, or the two of a pair."""
    hub_columns: tuple[str, ...] = ("sentence1", "sentence2")
    """The same in the hub's data set."""
    label_column: str = "label"
    """Column of the label in the TSV files."""
    header: tuple[str, ...] | None = None
    """Columns of train.tsv and dev.tsv where these have no header line."""
    dev: Mapping[str, tuple[str, str]] = field(default_factory=lambda: {"dev": ("dev.tsv", "validation")})
    """Development sets: name -> (TSV file, split on the hub)."""
    test: Mapping[str, tuple[str, str]]
    """Test sets: name in a submission -> (TSV file, split on the hub)."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Its metrics; their mean is the task's score."""
    epochs: int = 3
    """Passes over the training set."""
    batch_size: int = 16
    """Examples of one optimizer step."""
    lr: float = 5e-5
    """Peak learning rate."""
    symmetric: bool = False
    """The two sentences of a training pair change places at random."""

    @property
    def regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels


def _test(name: str) -> dict[str, tuple[str, str]]:
    return {name: ("test.tsv", "test")}


HUB_DATA = "nyu-mll/glue"
"""GLUE on the hub."""
ENTAILMENT = ("entailment", "not_entailment")
_TASKS = (
    Task(
        name="CoLA",
        hub="cola",
        columns=("sentence",),
        hub_columns=("sentence",),
        header=("source", "label", "mark", "sentence"),
        test=_test("CoLA"),
        metrics=("matthews",),
    ),
    Task(name="SST-2", hub="sst2", columns=("sentence",), hub_columns=("sentence",), test=_test("SST-2")),
    Task(
        name="MRPC",
        hub="mrpc",
        columns=("#1 String", "#2 String"),
        label_column="Quality",
        test=_test("MRPC"),
        metrics=("f1", "accuracy"),
        symmetric=True,
    ),
    Task(
        name="STS-B",
        hub="stsb",
        labels=(),
        label_column="score",
        test=_test("STS-B"),
        metrics=("pearson", "spearman"),
        epochs=4,
        batch_size=32,
        symmetric=True,
    ),
    Task(
        name="QQP",
        hub="qqp",
        columns=("question1", "question2"),
        hub_columns=("question1", "question2"),
        label_column="is_duplicate",
        test=_test("QQP"),
        metrics=("f1", "accuracy"),
        epochs=4,
        batch_size=32,
        symmetric=True,
    ),
    Task(
        name="MNLI",
        hub="mnli",
        labels=("entailment", "neutral", "contradiction"),
        hub_columns=("premise", "hypothesis"),
        label_column="gold_label",
        dev={
            "m": ("dev_matched.tsv", "validation_matched"),
            "mm": ("dev_mismatched.tsv", "validation_mismatched"),
        },
        test={
            "MNLI-m": ("test_matched.tsv", "test_matched"),
            "MNLI-mm": ("test_mismatched.tsv", "test_mismatched"),
            "AX": ("../diagnostic/diagnostic.tsv", "test"),
        },
    ),
    Task(
        name="QNLI",
        hub="qnli",
        labels=ENTAILMENT,
        columns=("question", "sentence"),
        hub_columns=("question", "sentence"),
        test=_test("QNLI"),
        batch_size=32,
    ),
    Task(name="RTE", hub="rte", labels=ENTAILMENT, test=_test("RTE"), epochs=4, lr=3e-5),
    # Gong et al. did not train on WNLI; it gets what the other small entailment task has.
    Task(name="WNLI", hub="wnli", test=_test("WNLI"), epochs=4, lr=3e-5),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
"""All tasks by name, in GLUE's order. The diagnostic set AX is a test set of MNLI: that model answers it."""


def select_tasks(names: str) -> list[Task]:
    """The tasks of `all` or of a list such as `CoLA,SST-2`; capitals and hyphens do not matter."""
    if names == "all":
        return list(TASKS.values())
    by_key = {_key(name): task for name, task in TASKS.items()}
    chosen = []
    for name in names.split(","):
        if _key(name) not in by_key:
            near = nearest(name, ["all", *TASKS])
            raise UserError(f"--tasks names {shown(name.strip())}, which is no task of GLUE; {near}")
        chosen.append(by_key[_key(name)].name)
    return [TASKS[name] for name in dict.fromkeys(chosen)]


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")
