"""Numbers and the table of stages, as a person reads them: shared by the console, the reports and the model card."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

HEADERS = ("layers", "steps", "tokens", "time", "FLOPs", "train loss", "held-out loss", "on [MASK] only")


def _scaled(value: float, suffixes: Sequence[str]) -> str:
    """Three to four significant digits with the largest suffix that leaves a number of 1 or more."""
    power = 0
    while abs(value) >= 999.95 and power < len(suffixes) - 1:
        value, power = value / 1000, power + 1
    number = f"{value:.1f}" if power or value != int(value) else f"{value:.0f}"
    return f"{number} {suffixes[power]}".strip()


def count(value: float | None) -> str:
    """`1.2 M`: tokens, parameters and other counts; B is 10^9 and T 10^12."""
    return "-" if value is None else _scaled(value, ("", "k", "M", "B", "T"))


def flops(value: float | None) -> str:
    """`3.4 PFLOP`: an amount of arithmetic (add `/s` for a rate)."""
    return (
        "-"
        if value is None
        else _scaled(value, [f"{prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")])
    )


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3:05 min` or `2:03:04 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


def loss(value: float | None) -> str:
    """A loss in nats with three decimals."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def stage_cells(stages: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row of cells under `HEADERS` for every stage of a summary; what is missing reads `-`."""
    return [
        (
            str(stage["layers"]),
            str(stage["steps"]),
            count(stage.get("tokens")),
            duration(stage.get("seconds")),
            flops(stage.get("flops")),
            loss(stage.get("train_loss_end")),
            loss(stage.get("eval_loss_end")),
            loss(stage.get("eval_loss_masked_end")),
        )
        for stage in stages
    ]


def stage_table(stages: Iterable[Mapping[str, Any]], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """The table of stages, ready to print on a rich console."""
    table = Table(box=style)
    for header in HEADERS:
        table.add_column(Text(header), justify="right", overflow="fold")  # as a string, [MASK] would be markup
    for cells in stage_cells(stages):
        table.add_row(*cells)
    return table


def stage_markdown(stages: Iterable[Mapping[str, Any]]) -> str:
    """The table of stages as Markdown."""
    return markdown(stage_table(stages, box.MARKDOWN))


def markdown(table: Table) -> str:
    """A table with the lines of `box.MARKDOWN` as text."""
    text = io.StringIO()
    Console(file=text, width=300, color_system=None).print(table)
    return "\n".join(line.strip() for line in text.getvalue().strip().splitlines())
