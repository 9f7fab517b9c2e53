"""What is counted of each kernel: the hot loop, the work of a launch, and the table in docs/kernels.md."""

from pathlib import Path

import pytest

from ds_stacking.kernels.cases import CASES
from ds_stacking.kernels.offline import TABLE, hot_loop, read_table
from ds_stacking.kernels.report import (
    BEGIN,
    CLOCK,
    COPY,
    MATMUL,
    MULTIPROCESSORS,
    VERSION,
    format_table,
    predict,
    predictions,
    with_report,
    work,
)

PAGE = Path(__file__).parents[2] / "docs/kernels.md"


def listing(*operations):
    return "\n".join(f"        /*{16 * at:04x}*/                   {op} ;" for at, op in enumerate(operations))


@pytest.mark.parametrize(
    ("operations", "body"),
    [
        (["MOV R1, R2", "NOP", "EXIT"], ["MOV R1, R2", "EXIT"]),  # no loop: all of it
        (["MOV R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "EXIT"], ["FADD R1, R1, R2", "BRA 0x10"]),
        (  # an inner loop, not the one around it
            ["IADD R0, R0, R1", "MUFU.EX2 R1, R1", "FADD R1, R1, R2", "@!P1 BRA 0x10", "BRA 0x0", "EXIT"],
            ["MUFU.EX2 R1, R1", "FADD R1, R1, R2", "BRA 0x10"],
        ),
        (["FADD R1, R1, R2", "@P0 BRA 0x0", "FMUL R1, R1, R1", "NOP", "FMUL R1, R1, R1", "@UP0 BRA 0x20"],
         ["FMUL R1, R1, R1", "FMUL R1, R1, R1", "BRA 0x20"]),  # the longest
        (["FADD R1, R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x0", "HGMMA.64x64x16.F32.BF16 R24", "BRA 0x30",
          "HGMMA.64x64x16.F32.BF16 R24", "FADD R1, R1, R2", "BRA 0x50"],
         ["HGMMA.64x64x16.F32.BF16 R24", "BRA 0x30"]),  # the first with products
        (["@P0 BRA 0x20", "FADD R1, R1, R2", "EXIT", "BRA 0x30"],
         ["BRA 0x20", "FADD R1, R1, R2", "EXIT", "BRA 0x30"]),
    ],
)  # fmt: skip
def test_the_hot_loop_is_found(operations, body):
    """Predicates are left out; a jump forward is no loop, nor is the trap behind the end that jumps to itself."""
    assert hot_loop(listing(*operations)) == body


def first(case, kernel):
    launch = next(launch for launch in CASES[case].launches() if launch.kernel.name == kernel)
    return launch, launch.candidates("sm_90")[0]


def test_work_is_counted_by_hand():
    done = work(*first("attention/512", "attention_kernels.forward"))
    tokens, heads, size, longest = 32768, 12, 64, 512
    assert done.operations == 4 * tokens * heads * size * longest
    assert done.elements == tokens * heads * longest and done.tile == 128 * 64
    tensors = 2 * tokens * heads * size * 4 + 4 * tokens * heads + 4 * (tokens // longest + 1)  # QKV, O, lse, starts
    assert done.bytes == tensors

    done = work(*first("add_layer_norm/768", "add_layer_norm.backward"))
    assert done.operations == 0 and done.elements == 32768 * 768 and done.tile == 2 * 768


def test_the_causal_half_is_not_counted():
    full = work(*first("attention/512", "attention_kernels.forward"))
    half = work(*first("attention/512-causal-dropout", "attention_kernels.forward"))
    assert half.operations == full.operations / 2


def test_what_holds_a_launch_up():
    rows = {row.key: row for row in read_table(TABLE.with_name(f"{VERSION}.json"))}
    launch, config = first("bias_gelu/3072", "bias_gelu.forward")
    row = next(row for key, row in rows.items() if key[:3] == ("bias_gelu/3072", "_forward", "sm_90"))
    found = predict(launch, config, row)
    elements, warps = 32768 * 3072, config.num_warps
    assert found.times["bytes"] == pytest.approx((4 * elements + 2 * 3072) / COPY)
    issue = elements / 2048 * warps * row.instructions / (4 * MULTIPROCESSORS * CLOCK)
    assert found.times["issue"] == pytest.approx(issue)
    assert found.limit == found.times["bytes"] and found.target == pytest.approx(found.limit / 0.8)


def test_every_kernel_with_products_has_them_counted():
    found = predictions(read_table(TABLE.with_name(f"{VERSION}.json")))
    assert len(found) > 20
    # tiles of fewer than 64 rows have products without warp groups
    assert {p.compiled.kernel for p in found if p.compiled.wgmma} == {
        p.compiled.kernel for p in found if p.work.operations
    }
    assert all(p.limit >= p.work.operations / MATMUL for p in found)


def test_the_page_shows_the_committed_figures():
    page = PAGE.read_text()
    assert page == with_report(page), "run make kernels-report"
    assert "add_layer_norm" in page.partition(BEGIN)[2]


def test_a_changed_figure_changes_the_table():
    rows = read_table(TABLE.with_name(f"{VERSION}.json"))
    before = format_table(predictions(rows))
    for row in rows:
        row.instructions += 1000
    assert format_table(predictions(rows)) != before
