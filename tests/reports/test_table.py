"""Numbers as a person reads them."""

import pytest

from ds_stacking.reports.table import count, duration, flops, loss, stage_markdown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1.0 k"), (999_949, "999.9 k"), (999_960, "1.0 M"), (110.1e6, "110.1 M")]
    + [(3.3e9, "3.3 B"), (2.5e12, "2.5 T"), (4e15, "4000.0 T"), (12.34, "12.3"), (None, "-")],
)
def test_count(value, text):
    assert count(value) == text


@pytest.mark.parametrize(("value", "text"), [(5, "5 FLOP"), (2.5e12, "2.5 TFLOP"), (1.5e21, "1.5 ZFLOP"), (None, "-")])
def test_flops(value, text):
    assert flops(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.44, "0.4 s"), (59.94, "59.9 s"), (59.96, "1:00 min"), (185.2, "3:05 min"), (3599.6, "1:00:00 h")]
    + [(7384, "2:03:04 h"), (None, "-"), (float("inf"), "-")],
)
def test_duration(value, text):
    assert duration(value) == text


def test_loss():
    assert [loss(value) for value in (5.12345, None, float("nan"))] == ["5.123", "-", "-"]


def test_stage_table_in_markdown():
    rows = stage_markdown([{"layers": 2, "steps": 450, "tokens": 921_600, "eval_loss_end": 5.61}]).splitlines()
    assert [cell.strip() for cell in rows[0].strip("|").split("|")][-1] == "on [MASK] only"
    assert set(rows[1]) == {"|", "-"}
    assert [cell.strip() for cell in rows[2].strip("|").split("|")] == [
        *("2", "450", "921.6 k", "-", "-", "-", "5.610", "-"),
    ]
