"""Which kernels the GPU check's rows launch, as recorded on meta tensors for a GPU of 132 multiprocessors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LONG = {"attention_heads_kernel.backward_heads"}
LONG |= {f"attention_backward_kernels.backward_{form}" for form in ("queries", "keys")}
LONG |= {f"selected_attention_kernels.selected_{form}" for form in ("forward", "backward_queries", "backward_keys")}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches of a row: (its name, at a full or small size) -> a list."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import correctness, precompile, sanitizer
    from benchmarks.gpu_check.catalogue import on_meta

    rows = {row.name: row for row in [*correctness.rows(), *sanitizer.small_rows()]}
    return lambda name, small=False: precompile.launches(rows[name], on_meta(dry=False, small=small))


def names(launches: list[Any]) -> set[str]:
    return {launch.kernel.name for launch in launches}


def test_the_sanitizer_watches_every_form_of_attention(record: Any) -> None:
    from benchmarks.gpu_check import correctness

    watched = [name for name, _, _ in correctness.watched()]
    assert set(correctness.SMALL) <= set(watched)
    found = set().union(*(names(record(f"watched: {name}", small=True)) for name in watched))
    assert found >= {*LONG, "attention_backward_kernels.backward_short"}, found
    raced = [record(f"watched: {name}", small=True) for name in watched[: correctness.RACES]]
    assert set().union(*map(names, raced)) >= {name for name in LONG if "selected" not in name}


def test_numbers_cover_what_training_launches(record: Any) -> None:
    from benchmarks.gpu_check import correctness

    found = set().union(*(names(record(f"correct: {name}")) for name, _, _ in correctness.cases()))
    assert found >= LONG | {"linear_cross_entropy.gradient", "kept_logits.cross_entropy"}, found


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("attention S=128 64 sequences p=0.1", "backward_short"),
        ("attention S=512 32 sequences p=0.1", "backward_heads"),
        ("attention S=512 causal p=0.1 32 sequences", "backward_heads"),
        ("attention S=512 padded p=0.1", "backward_heads"),
    ],
)
def test_programs_that_stay_take_a_second_head(record: Any, name: str, kernel: str) -> None:
    (launch,) = (launch for launch in record(f"correct: {name}") if launch.kernel.name.endswith(kernel))
    given = dict(zip(launch.kernel.fn.arg_names, launch.args, strict=False))
    assert given["heads"] > given["programs"] > 100, given


def _one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results with two readers lose the second one's gradient."""
    from ds_stacking.kernels import _readers

    monkeypatch.setattr(_readers._ReadTwice, "backward", staticmethod(lambda ctx, first, second: (first, None)))


def _first_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables get the gradient of the first `len(index)` tokens alone; the last one of these is left out."""
    for name in ("small_tables", "embedding_norm"):
        module = importlib.import_module(f"ds_stacking.kernels.{name}")
        right = module.table_gradient
        monkeypatch.setattr(
            module,
            "table_gradient",
            lambda dout, index, rows, right=right: right(dout[: len(index) - 1], index[:-1], rows),
        )


def _other_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula drops by the seed next to the kernels'."""
    from benchmarks.gpu_check import subjects

    right = subjects.drop
    monkeypatch.setattr(subjects, "drop", lambda x, seed, *rest: right(x, seed + 1, *rest))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("add_layer_norm N=768 post-LN p=0.1", _one_reader),
        ("embedding_norm documents p=0.1", _one_reader),
        ("embedding_norm p=0.1", _first_period),
        ("look_up", _first_period),
        ("selected_attention S=512 p=0.1", _other_mask),
        ("attention S=127 padded p=0.1", _other_mask),
    ],
)
def test_faults_are_noticed(record: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import catalogue, correctness
    from benchmarks.gpu_check.worker import BLOCKS
    from ds_stacking.kernels.interpreter import interpreted

    at = catalogue.machine(dry=True)
    (make,) = (make for known, _, make in correctness.cases() if known == name)
    torch.manual_seed(0)
    with interpreted(**BLOCKS):
        assert correctness.compare(make(at), at.dtype, True)["ok"]
        fault(monkeypatch)
        assert not correctness.compare(make(at), at.dtype, True)["ok"]
