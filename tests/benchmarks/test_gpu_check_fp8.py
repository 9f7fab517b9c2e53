"""The GPU check's rows of products in 8 bits: what they launch, which faults they notice, where they are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All rows of this kind, by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_check import catalogue

    return {row.name: row for row in catalogue.rows() if "fp8" in row.name}


def test_all_forms_of_the_cast_are_compiled_beforehand(rows: Any) -> None:
    """Both copies, one, the other; in both formats; for every layer of BERT-large."""
    from benchmarks.gpu_check import precompile
    from benchmarks.gpu_check.catalogue import on_meta

    assert len(rows) == 4 + 1 + 2 + 4 + 1
    for name, row in rows.items():
        launches = precompile.launches(row, on_meta(dry=False))
        given = [launch.constexprs for launch in launches if launch.kernel.name == "fp8_cast.cast"]
        forms = {(c["L"], c["STRAIGHT"], c["TURNED"]) for c in given}
        trained = {(8, True, True), (8, True, False), (8, False, True), (15, True, True)}
        if name.startswith("correct: cast"):
            length = 8 if "e4m3" in name else 15
            assert forms == {(length, True, True), (length, True, False), (length, False, True)}
            assert {c["N"] for c in given} == {int(name.split("N=")[1].split()[0])}
        elif name.startswith("speed: cast"):
            assert forms == {(8, True, True)}
        else:
            assert forms == trained, name
    # the last row is the model; its last block has a product for keys and values alone
    assert {c["N"] for c in given} == {1024, 2048, 3072, 4096}


def test_the_sanitizer_watches_the_cast(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both formats; on a GPU that does not multiply them it leaves that out, and it refuses unknown names."""
    from benchmarks.gpu_check import fp8, sanitizer

    watched = [row.name for row in sanitizer.small_rows() if "fp8" in row.name]
    assert watched == ["correct: cast_fp8 N=768 e4m3", "correct: cast_fp8 N=768 e5m2"]
    cast: list[torch.dtype] = []
    right = fp8.cast_fp8
    monkeypatch.setattr(
        fp8, "cast_fp8", lambda x, amax, dtype, **how: cast.append(dtype) or right(x, amax, dtype, **how)
    )
    sanitizer.main(["--dry", *watched])
    assert cast == [torch.float8_e4m3fn] * 3 + [torch.float8_e5m2] * 3
    monkeypatch.setattr(fp8, "refusal", lambda at: "no")
    sanitizer.main(["--dry", *watched])
    assert len(cast) == 6
    with pytest.raises(KeyError):
        sanitizer.main(["--dry", "correct: nothing"])


def _half_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_stacking.kernels import fp8_cast

    right = fp8_cast.launch
    monkeypatch.setattr(fp8_cast, "launch", lambda *args, L, **more: right(*args, L=L - 1, **more))


def _the_last_program_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_stacking.kernels import fp8_cast

    right = fp8_cast.launch
    monkeypatch.setattr(
        fp8_cast,
        "launch",
        lambda kernel, grid, *args, **more: right(kernel, lambda m: (grid(m)[0] - 1,), *args, **more),
    )


def _once_the_transposed_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit, in the second run only."""
    from benchmarks.gpu_check import fp8

    right, calls = fp8.cast_fp8, []

    def cast(*args: Any, straight: bool = True, turned: bool = True) -> Any:
        copy, transposed, inverse = right(*args, straight=straight, turned=turned)
        calls.append(straight)
        if calls.count(False) == 2 and not straight:
            transposed.view(torch.uint8)[3, 5] ^= 1
        return copy, transposed, inverse

    monkeypatch.setattr(fp8, "cast_fp8", cast)


def _one_scale_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_stacking.models import fp8

    right = fp8.multiply
    monkeypatch.setattr(fp8, "multiply", lambda a, scale, b, _, *more, **how: right(a, scale, b, scale, *more, **how))


def _sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import fp8

    monkeypatch.setattr(fp8, "linear", F.linear)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("correct: cast_fp8 N=768 e4m3", _half_the_scale),
        ("correct: cast_fp8 N=4096 e5m2", _half_the_scale),
        ("correct: cast_fp8 N=768 e5m2", _the_last_program_missing),
        ("correct: cast_fp8 N=768 e4m3", _once_the_transposed_copy_alone),
        ("correct: linear fp8", _one_scale_for_both),
        ("correct: linear fp8", _the_last_program_missing),
        ("correct: linear fp8", _sixteen_bits),
    ],
)
def test_faults_are_noticed(rows: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import catalogue, report
    from benchmarks.gpu_check.worker import perform

    at = catalogue.machine(dry=True)
    right = perform(rows[name], at)
    assert right["ok"], right
    fault(monkeypatch)
    wrong = perform(rows[name], at)
    assert wrong["ok"] is False, wrong
    assert f"WRONG {name}: {wrong['found']}" in report.table({name: wrong}, [])


def test_a_gpu_that_does_not_multiply_it_skips_all(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check.catalogue import Machine

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    at = Machine(device="cuda", dtype=torch.bfloat16)
    for row in rows.values():
        assert "8.9 or more" in row.run(at)["skipped"]
