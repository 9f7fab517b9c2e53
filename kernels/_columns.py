"""Second step of column sums: partial sums of persistent programs become one row, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_stacking.kernels._launch import Kernel, launch


@triton.jit(do_not_specialize=["programs"])
def _sum_partials(PARTIALS, OUT, programs, columns, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows[:, None] < programs) & (cols[None, :] < columns)
        acc += tl.load(PARTIALS + rows[:, None].to(tl.int64) * columns + cols[None, :], mask=mask, other=0.0)
    tl.store(OUT + cols, tl.sum(acc, axis=0), mask=cols < columns)


SUM_PARTIALS = Kernel(
    fn=_sum_partials, configs=lambda target, meta: [triton.Config({"BLOCK_P": 128, "BLOCK_N": 32}, num_warps=4)]
)


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum fp32 `partials` [P, K, N] over P; returns [K, N] in `dtype`."""
    programs, kinds, width = partials.shape
    out = torch.empty(kinds, width, dtype=dtype, device=partials.device)
    columns = kinds * width
    launch(SUM_PARTIALS, lambda meta: (triton.cdiv(columns, meta["BLOCK_N"]),), partials, out, programs, columns)
    return out
