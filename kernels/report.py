"""What each kernel can reach on an H100, by counting: `make kernels-report` writes it into docs/kernels.md.

The limit of a launch is the larger of two times: every tensor argument moved once, and the products it cannot do
without. Beside it stand three more: issuing the instructions of its hot loop, its special functions, and waiting for
each tile's loads as often as resident programs do not overlap them. Where all of that overlaps, the launch takes the
largest of the five times; where nothing does, it takes limit, issue or special functions, and waits one after another.
Its share of the limit lies between. The tail of a grid is not modelled.

Instructions and resident programs are those of the committed tables (`kernels.offline`), work is counted on the
recorded launches of `kernels.cases`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from ds_stacking.kernels._launch import Launch, describe
from ds_stacking.kernels.cases import CASES
from ds_stacking.kernels.offline import TABLE, Compiled, read_table

VERSION = "3.6.0"
"""The Triton of the GPU hosts."""
COPY, MATMUL = 3.0e12, 800e12
"""Bytes and bf16 floating-point operations per second that an H100 reaches."""
MULTIPROCESSORS, CLOCK = 132, 1.7e9
ISSUE, SPECIAL = 4, 16
"""Warp instructions, and lanes of special functions, that a multiprocessor starts per cycle."""
LATENCY = 0.6e-6
"""Seconds from a load to its data."""
PRODUCTS = {"forward": 2, "backward_queries": 3, "backward_keys": 4, "backward_short": 5, "backward_heads": 5}
"""Matrix products of attention's kernels."""
SHARES = {
    **dict.fromkeys(("add_layer_norm.forward", "add_layer_norm.backward"), 0.85),
    **dict.fromkeys(("bias_gelu.forward", "bias_gelu.backward"), 0.80),
}
"""Targets as a share of the limit."""
RATES = {"forward": 1.3 * 282e12, "backward_heads": 266e12}
"""Targets of attention at 512 tokens, operations per second: 1.3 times FlashAttention-2, and cuDNN, both published."""
IN_PLACE = ("kept_logits.cross_entropy",)
"""Kernels that read and write their first tensor."""
BEGIN, END = "<!-- kernels-report -->\n", "<!-- end of kernels-report -->\n"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch has to do."""

    bytes: int
    """Of all tensors, each moved once."""
    operations: float
    """Floating-point operations of matrix products."""
    elements: float
    """What hot loops work through: elements of rows, or scores of attention; 0 where the loop is over neither."""
    tile: int
    """Of these, what a program works through in one pass of the loop."""


def work(launch: Launch, config: triton.Config) -> Work:
    """Count the work of a recorded launch."""
    sizes = {name: x for name, x in zip(launch.kernel.fn.arg_names, launch.args, strict=False) if isinstance(x, int)}
    meta = {**launch.constexprs, **config.kwargs}
    total = _bytes(launch, sizes.get("rows", 0))
    room, _, kernel = launch.kernel.name.rpartition(".")
    if "attention" in room:
        tile = meta["BLOCK"] ** 2 if "BLOCK" in meta else meta["BLOCK_M"] * meta["BLOCK_N"]
        rows, longest = sizes.get("selected", sizes.get("tokens", 0)) * meta["H"], sizes["longest"]
        scores = rows * longest * (0.5 if meta.get("CAUSAL") else 1)
        products = PRODUCTS[kernel.removeprefix("selected_")]
        # a tile that reaches beyond a short sequence costs a whole one
        elements = max(scores, rows * tile / longest)
        return Work(bytes=total, operations=2 * products * meta["D"] * scores, elements=elements, tile=tile)
    if "K" in meta:
        columns = sizes.get("columns") or meta["N"]
        return Work(bytes=total, operations=2 * sizes["rows"] * columns * meta["K"], elements=0, tile=1)
    if "ROWS" in meta:
        tile = meta["ROWS"] * min(meta["N"], meta["BLOCK_N"])
        return Work(bytes=total, operations=0, elements=sizes["rows"] * meta["N"], tile=tile)
    return Work(bytes=total, operations=0, elements=0, tile=1)


def _bytes(launch: Launch, rows: int) -> int:
    """Of all tensors; of a table that rows are gathered from, as many rows as there are."""
    gathers = launch.kernel.name.rpartition(".")[0] in ("embedding_norm", "gather_rows")
    tensors = {id(x): x for x in launch.args if isinstance(x, torch.Tensor)}.values()
    sizes = [
        (x.numel() * x.element_size(), max(1, len(x) // rows) if gathers and x.dim() == 2 else 1) for x in tensors
    ]
    in_place = sizes[0][0] if launch.kernel.name in IN_PLACE else 0
    return sum(size // part for size, part in sizes) + in_place


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a launch by what may hold it up: bytes, products, issue, special, latency."""

    compiled: Compiled
    work: Work
    times: dict[str, float]
    target: float | None
    """Seconds of the target; None where there is none."""

    @property
    def limit(self) -> float:
        """Seconds by bytes and products alone."""
        return max(self.times["bytes"], self.times["products"])

    @property
    def shares(self) -> tuple[float, float]:
        """Share of the limit where nothing overlaps, and where everything does."""
        serial = self.limit + max(self.times["issue"], self.times["special"]) + self.times["latency"]
        return self.limit / serial, self.limit / max(self.times.values())


def predict(launch: Launch, config: triton.Config, compiled: Compiled) -> Prediction:
    """The model."""
    todo = work(launch, config)
    passes = todo.elements / todo.tile
    lanes = passes * 32 * config.num_warps
    device = MULTIPROCESSORS * CLOCK
    times = {
        "bytes": todo.bytes / COPY,
        "products": todo.operations / MATMUL,
        "issue": lanes / 32 * compiled.instructions / (ISSUE * device),
        "special": lanes * compiled.special / (SPECIAL * device),
    }
    ahead = config.num_stages - 1 if todo.operations else config.kwargs.get("STAGES", 1)
    times["latency"] = passes * LATENCY / (compiled.programs * MULTIPROCESSORS * max(1, ahead))
    name = launch.kernel.name
    limit, target = max(times["bytes"], times["products"]), None
    if name in SHARES:
        target = limit / SHARES[name]
    elif compiled.case in ("attention/512", "attention/512-dropout") and name.rpartition(".")[2] in RATES:
        target = todo.operations / RATES[name.rpartition(".")[2]]
    return Prediction(compiled=compiled, work=todo, times=times, target=target)


def predictions(rows: list[Compiled]) -> list[Prediction]:
    """For each launch of each case on sm_90 in 16 bits, in its first candidate, the one that runs unmeasured."""
    table = {row.key: row for row in rows}
    found: dict[tuple[str, str, str, str], Prediction] = {}
    for case in sorted(name for name, case in CASES.items() if "sm_90" in case.targets and "fp32" not in name):
        for launch in CASES[case].launches():
            config = launch.candidates("sm_90")[0]
            key = (case, launch.kernel.fn.__name__, "sm_90", describe(config))
            found[key] = found.get(key) or predict(launch, config, table[key])
    return list(found.values())


def format_table(found: list[Prediction]) -> str:
    """As Markdown; what takes less than half a microsecond is left out."""
    lines = [
        "| case | kernel | tiles | programs | instr. per element | limit, us | issue, us | special, us | waits, us "
        "| share | target |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for prediction in found:
        row, todo, times = prediction.compiled, prediction.work, prediction.times
        if prediction.limit < 0.5e-6:
            continue
        threads = 32 * int(row.config.split("warps=")[1].split()[0])
        bound = "bytes" if times["bytes"] >= times["products"] else "products"
        low, high = prediction.shares
        counted = [f"{row.instructions * threads / todo.tile:.1f}"] if todo.elements else [""]
        counted += [f"{prediction.limit * 1e6:.1f} ({bound})"]
        counted += [f"{times[name] * 1e6:.1f}" if todo.elements else "" for name in ("issue", "special", "latency")]
        counted += [f"{low:.0%} to {high:.0%}" if todo.elements else ""]
        target = f"{prediction.limit / prediction.target:.0%}" if prediction.target else ""
        cells = [row.case, row.kernel.lstrip("_"), row.config, str(row.programs), *counted, target]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_report(page: str) -> str:
    """The page with the table of today's committed figures between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = read_table(TABLE.with_name(f"{VERSION}.json"))
    return before + BEGIN + "\n" + format_table(predictions(rows)) + "\n" + END + after


if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = with_report(path.read_text())
    path.write_text(text)
    print(text.partition(BEGIN)[2].partition(END)[0])
