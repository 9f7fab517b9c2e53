"""Gather and scatter of rows: packing padded batches, picking masked tokens, dropping tokens and putting them back.

    out[i] = x[index[i]] where index[i] >= 0, else base[i] or 0

With an index and its inverse both directions, and both gradients, are this one gather: each element is read once and
written once, nothing is filled with zeros beforehand and nothing is added atomically. Rows may not repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from ds_stacking.kernels._launch import Kernel, check, launch, runs_kernels

# T rows of the whole, M rows of the selection, N columns


@triton.jit(do_not_specialize=["rows"])
def _select(
    X, INDEX, BASE, OUT, rows, N: tl.constexpr, HAS_BASE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.load(INDEX + row, mask=row < rows, other=-1).to(tl.int64)
    inside = (row[:, None] < rows) & (col[None, :] < N)
    found = index[:, None] >= 0
    at = row[:, None].to(tl.int64) * N + col[None, :]
    value = tl.load(X + index[:, None] * N + col[None, :], mask=inside & found, other=0.0)
    if HAS_BASE:
        value = tl.where(found, value, tl.load(BASE + at, mask=inside & (index[:, None] < 0), other=0.0))
    tl.store(OUT + at, value, mask=inside)


SELECT = Kernel(fn=_select, configs=lambda target, meta: [triton.Config({"ROWS": 8, "BLOCK_N": 256}, num_warps=4)])


@triton_op("ds_stacking::select_rows", mutates_args=())
def _select_rows(
    x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    """[len(index), N]; `inverse` is for the gradient."""
    if not runs_kernels(x):
        found = (index >= 0)[:, None]
        return torch.where(found, x[index.clamp(min=0)] if x.shape[0] else 0, 0 if base is None else base)
    rows, width = index.numel(), x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    launch(
        SELECT, lambda meta: (triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(width, meta["BLOCK_N"]),), x, index,
        x if base is None else base, out, rows, N=width, HAS_BASE=base is not None,
    )  # fmt: skip
    return out


def _save(ctx, inputs, output):
    _, index, inverse, base = inputs
    ctx.save_for_backward(index, inverse)
    ctx.has_base = base is not None


def _differentiate(ctx, dout):
    index, inverse = ctx.saved_tensors
    dbase = dout.masked_fill((index >= 0)[:, None], 0) if ctx.has_base else None
    return _select_rows(dout.contiguous(), inverse, index, None), None, None, dbase


_select_rows.register_autograd(_differentiate, setup_context=_save)


def inverse_index(indices: torch.Tensor, rows: int) -> torch.Tensor:
    """int64 [rows]: the position of each row among `indices` [M] (no repeats), -1 where it is not among them."""
    inverse = torch.full((rows,), -1, dtype=torch.int64, device=indices.device)
    return inverse.scatter_(0, indices, torch.arange(indices.numel(), device=indices.device))


def gather_rows(x: torch.Tensor, indices: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Rows `indices` of `x`.

    Args:
        x: [T, N], contiguous, any floating type.
        indices: int64 [M] without repeats.
        inverse: `inverse_index(indices, T)`, made once for all calls with these indices.

    Returns:
        [M, N]; the gradient of the other rows is zero.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(x, indices, inverse, inverse.shape[0])
    return _select_rows(x, indices, inverse, None)


def scatter_rows(
    x: torch.Tensor, indices: torch.Tensor, inverse: torch.Tensor, base: torch.Tensor | None = None
) -> torch.Tensor:
    """The reverse of `gather_rows`: rows of `x` [M, N] at `indices` of a copy of `base` [T, N], of zeros if None.

    Returns:
        [T, N]; the gradient of `base` is zero on replaced rows.
    """
    _check(x, indices, inverse, indices.shape[0])
    check(
        base is None
        or (base.shape == (inverse.shape[0], x.shape[1]) and base.dtype == x.dtype and base.is_contiguous()),
        lambda: (
            f"base is {base.dtype if base is not None else ''} {tuple(base.shape) if base is not None else ()}; "
            f"it must be contiguous {x.dtype} [{inverse.shape[0]}, {x.shape[1]}]."
        ),
    )
    return _select_rows(x, inverse, indices, base)


def _check(x, indices, inverse, rows):
    check(
        x.dim() == 2 and x.is_contiguous() and x.shape[0] == rows,
        lambda: f"x has shape {tuple(x.shape)} and strides {x.stride()}; it must be contiguous [{rows}, N].",
    )
    for name, index in (("indices", indices), ("inverse", inverse)):
        check(
            index.dtype == torch.int64 and index.dim() == 1 and index.device == x.device,
            lambda: (
                f"{name} is {index.dtype} {tuple(index.shape)} on {index.device}; "
                f"it must be torch.int64 of one dimension on {x.device}."
            ),
        )
