"""A tile of A B^T in fp32, for kernels that do something to a matrix product before it is stored."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def product(
    A, B, row, column, rows, columns,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Rows `row` of A [rows, K] times columns `column` of B [columns, K]^T; indices beyond repeat the last one."""
    row = tl.minimum(row, rows - 1).to(tl.int64)
    column = tl.minimum(column, columns - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        at = (k + inner)[None, :]
        if K % BLOCK_K == 0:
            a = tl.load(A + row[:, None] * K + at)
            b = tl.load(B + column[:, None] * K + at)
        else:
            a = tl.load(A + row[:, None] * K + at, mask=at < K, other=0.0)
            b = tl.load(B + column[:, None] * K + at, mask=at < K, other=0.0)
        if UPCAST_DOT:
            acc += tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)))
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def tile_of(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of this program's tile, GROUP rows of tiles together so that their operands stay in L2."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    return group * GROUP + within % height, within // height


def product_configs(target: str, meta: dict[str, Any]) -> list[triton.Config]:
    """Tiles of BLOCK_M rows for the host's BLOCK_N columns (`tile_width`); fp32 is exact and slow."""
    if meta["ITEMSIZE"] == 4:
        found = [(32, 32, 4, 1)]
    else:
        found = {
            "sm_80": [(128, 32, 8, 3)],
            "sm_90": [(128, 64, 8, 3), (64, 64, 4, 4)],
            "sm_100": [(128, 64, 8, 3)],
            "gfx942": [(128, 32, 8, 2)],
        }[target]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
        for m, k, warps, stages in found
    ]


def tile_width(itemsize: int) -> int:
    """Columns of a tile; not tuned, because the number of tiles is the shape of an intermediate result."""
    return 32 if itemsize == 4 else 128


def tile_grid(rows: int, columns: int, width: int) -> Any:
    """One program per tile."""
    return lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, width),)
