"""y = LayerNorm(z), z = residual + dropout(x + bias): bias, dropout, residual sum and norm in one pass each way.

    xhat = (z - mean) * rstd                        y = xhat * weight + shift
    g = dy * weight                                 dz = rstd * (g - avg(g) - xhat * avg(g * xhat)) + dsum
    dresidual = dz                                  dx = keep * dz / (1 - p)
    dweight = sum(dy * xhat)    dshift = sum(dy)    dbias = sum(dx)

Post-LN models read y twice, in the next product and the next residual sum: dy is the sum of two gradients. Pre-LN
models also read the sum z, whose gradient is dsum. Neither is added by a kernel of its own. Statistics are fp32.
Programs are persistent: each walks tiles of ROWS rows and keeps its column sums in registers, so the backward pass
reads every tensor once; a second kernel adds the programs' partial sums. Bytes per token, u = one row: forward 2u in
and 2u out; backward 2u in (3u with dsum or a second dy) and 1u out (2u with dropout).

Layer normalization: Ba, Kiros and Hinton 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from ds_stacking.kernels._columns import sum_partials
from ds_stacking.kernels._dropout import column_hash, keep_mask, new_seed, row_hash, seed_key, threshold
from ds_stacking.kernels._launch import Kernel, check, launch, multiprocessors, runs_kernels
from ds_stacking.kernels._readers import read_twice, second_reader

# T rows (tokens), N columns (hidden size)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    X, RESIDUAL, BIAS, WEIGHT, SHIFT, SEED, Y, Z, MEAN, RSTD, rows, eps, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, STORE_SUM: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + cols, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        key = seed_key(SEED)
        column = column_hash(key, cols)
    stride = tl.full([], ROWS * N, tl.int64)  # one 64-bit base per tile, 32-bit offsets within it
    at = tl.arange(0, ROWS)[:, None] * N + cols[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row[:, None] < rows) & inside[None, :]
        start = tile * stride
        z = tl.load(X + start + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, N]
        if HAS_BIAS:
            z += bias[None, :]
        if THRESHOLD > 0:
            keep = row_hash(key, row)[:, None] * column[None, :] >= THRESHOLD
            z = tl.where(keep, z * scale, 0.0)
        if HAS_RESIDUAL:
            z += tl.load(RESIDUAL + start + at, mask=mask, other=0.0).to(tl.float32)
        if STORE_SUM:
            tl.store(Z + start + at, z, mask=mask)
        mean = tl.sum(z, axis=1) / N
        centred = tl.where(inside[None, :], z - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        y = centred * rstd[:, None] * weight[None, :] + shift[None, :]
        tl.store(Y + start + at, y, mask=mask)
        tl.store(MEAN + row, mean, mask=row < rows)
        tl.store(RSTD + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward(
    DY, DY2, DSUM, Z, WEIGHT, MEAN, RSTD, SEED, DZ, DX, PARTIALS, rows, programs, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SECOND: tl.constexpr,
    HAS_SUM: tl.constexpr, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        key = seed_key(SEED)
        column = column_hash(key, cols)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dshift = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    stride = tl.full([], ROWS * N, tl.int64)  # one 64-bit base per tile, 32-bit offsets within it
    at = tl.arange(0, ROWS)[:, None] * N + cols[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row[:, None] < rows) & inside[None, :]
        start = tile * stride
        z = tl.load(Z + start + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, N]
        dy = tl.load(DY + start + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, N]
        if HAS_SECOND:
            dy += tl.load(DY2 + start + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + row, mask=row < rows, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        xhat = (z - mean[:, None]) * rstd[:, None]
        dweight += tl.sum(dy * xhat, axis=0)
        dshift += tl.sum(dy, axis=0)
        g = dy * weight[None, :]
        # masked columns hold g = 0, so they add nothing to either average
        average = tl.sum(g, axis=1) / N
        projection = tl.sum(g * xhat, axis=1) / N
        dz = rstd[:, None] * (g - average[:, None] - xhat * projection[:, None])
        if HAS_SUM:
            dz += tl.load(DSUM + start + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DZ + start + at, dz, mask=mask)
        if THRESHOLD > 0:
            keep = row_hash(key, row)[:, None] * column[None, :] >= THRESHOLD
            dz = tl.where(keep, dz * scale, 0.0)
            tl.store(DX + start + at, dz, mask=mask)
        if HAS_BIAS:
            dbias += tl.sum(tl.where(mask, dz, 0.0), axis=0)
    at = PARTIALS + tl.program_id(0) * KINDS * N + cols
    tl.store(at, dweight, mask=inside)
    tl.store(at + N, dshift, mask=inside)
    if HAS_BIAS:
        tl.store(at + 2 * N, dbias, mask=inside)


FORWARD_WARPS, BACKWARD_WARPS = 24, 16
"""Warps that stay resident on a multiprocessor of sm_90 in every configuration, by kernels/compiled: a persistent
kernel of more programs runs the rest when the first are through, and of fewer leaves loads out of flight."""
WARP = 512
"""Elements of a tensor that a warp has at a time: 16 per thread, two loads of 16 bytes. 16 warps keep 32 kB in flight
on a multiprocessor, twice what latency times bandwidth asks for."""


def resident_rows(width: int, warps: int, device: torch.device) -> int:
    """Rows of `width` elements, a power of two, that so many warps per multiprocessor of `device` have at a time."""
    return max(1, warps * WARP // width) * multiprocessors(device)


def tile_rows(width: int) -> int:
    """Rows that a program of four warps has at a time, or more warps where one row takes them."""
    return max(1, min(32, 4 * WARP // width))


def row_tiles(target: str, meta: dict) -> list[triton.Config]:
    """Configurations of kernels that walk whole rows."""
    width = meta["BLOCK_N"]
    if width > 4 * WARP:
        return [triton.Config({"ROWS": 1, "STAGES": 1}, num_warps=min(16, width // WARP))]
    rows = tile_rows(width)
    small = triton.Config({"ROWS": rows, "STAGES": 1}, num_warps=4)
    pipelined = triton.Config({"ROWS": rows, "STAGES": 3}, num_warps=4)
    large = triton.Config({"ROWS": 2 * rows, "STAGES": 1}, num_warps=8)
    return [small, pipelined, large] if target == "sm_90" else [small]


FORWARD = Kernel(fn=_forward, configs=row_tiles, key=("rows",))
# of the same number of programs each, since that is the length of the partial sums
BACKWARD = Kernel(fn=_backward, configs=lambda target, meta: row_tiles(target, meta)[:2], key=("rows",))


@triton_op("ds_stacking::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    store_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [T, N], z [T, N] or empty, mean [T] fp32, rstd [T] fp32, what `read_twice` needs [T, N])."""
    if not runs_kernels(x):
        return _forward_reference(x, residual, bias, weight, shift, seed, p, eps, store_sum)
    rows, width = x.shape
    y, z = torch.empty_like(x), torch.empty_like(x) if store_sum else x.new_empty(0)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(width)
    walked = min(rows, resident_rows(block, FORWARD_WARPS, x.device))
    launch(
        FORWARD, lambda meta: (triton.cdiv(walked, meta["ROWS"]),), x, x if residual is None else residual,
        weight if bias is None else bias, weight, shift, mean if seed is None else seed, y, z, mean, rstd, rows, eps,
        1 / (1 - p), N=width, BLOCK_N=block, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        STORE_SUM=store_sum, THRESHOLD=threshold(p),
    )  # fmt: skip
    return y, z, mean, rstd, second_reader(y)


@triton_op("ds_stacking::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    dy: torch.Tensor,
    dy2: torch.Tensor | None,
    dsum: torch.Tensor | None,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz [T, N], dx [T, N] or empty where it equals dz, [dweight, dshift(, dbias)] as one tensor [2 or 3, N])."""
    if not runs_kernels(dy):
        return _backward_reference(dy, dy2, dsum, z, weight, mean, rstd, seed, p, has_bias)
    rows, width = dy.shape
    kinds = 3 if has_bias else 2
    dz, dx = torch.empty_like(z), torch.empty_like(z) if p > 0 else z.new_empty(0)
    block = triton.next_power_of_2(width)
    programs = triton.cdiv(min(rows, resident_rows(block, BACKWARD_WARPS, dy.device)), tile_rows(block))
    partials = torch.empty(programs, kinds, width, dtype=torch.float32, device=dy.device)
    launch(
        BACKWARD, (programs,), dy, dy if dy2 is None else dy2, dy if dsum is None else dsum, z, weight, mean, rstd,
        mean if seed is None else seed, dz, dx, partials, rows, programs, 1 / (1 - p),
        N=width, BLOCK_N=block, HAS_SECOND=dy2 is not None, HAS_SUM=dsum is not None,
        HAS_BIAS=has_bias, KINDS=kinds, THRESHOLD=threshold(p),
    )  # fmt: skip
    return dz, dx, sum_partials(partials, weight.dtype)


def _keep(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return keep_mask(seed, rows[:, None], columns[None, :], p)


def _forward_reference(x, residual, bias, weight, shift, seed, p, eps, store_sum):
    z = x.float() if x.dtype != torch.float64 else x
    if bias is not None:
        z = z + bias
    if p > 0:
        z = torch.where(_keep(x, seed, p), z / (1 - p), 0.0)
    if residual is not None:
        z = z + residual
    mean = z.mean(1)
    rstd = (z.var(1, unbiased=False) + eps).rsqrt()
    y = (z - mean[:, None]) * rstd[:, None] * weight + shift
    y = y.to(x.dtype)
    return y, z.to(x.dtype, copy=True) if store_sum else x.new_empty(0), mean, rstd, second_reader(y)


def _backward_reference(dy, dy2, dsum, z, weight, mean, rstd, seed, p, has_bias):
    xhat = (z - mean[:, None]) * rstd[:, None]
    dy = dy if dy2 is None else dy.to(xhat.dtype) + dy2
    g = dy * weight
    dz = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    if dsum is not None:
        dz = dz + dsum
    dx = torch.where(_keep(dy, seed, p), dz / (1 - p), 0.0) if p > 0 else dz
    sums = [(dy * xhat).sum(0), dy.sum(0, dtype=xhat.dtype), *([dx.sum(0)] if has_bias else [])]
    return dz.to(z.dtype), dx.to(z.dtype) if p > 0 else z.new_empty(0), torch.stack(sums).to(weight.dtype)


def _save(ctx, inputs, output):
    x, residual, bias, weight, _, seed, ctx.p, _, store_sum = inputs
    _, z, mean, rstd, _ = output
    # without residual, bias and dropout the sum is x itself and was not stored
    ctx.save_for_backward(z if store_sum else x, weight, mean, rstd, seed)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dsum, dmean, drstd, dy2):
    z, weight, mean, rstd, seed = ctx.saved_tensors
    dy = torch.zeros_like(z) if dy is None else dy.contiguous()
    dy2, dsum = (None if gradient is None else gradient.contiguous() for gradient in (dy2, dsum))
    dz, dx, sums = _add_layer_norm_backward(dy, dy2, dsum, z, weight, mean, rstd, seed, ctx.p, ctx.has_bias)
    dresidual, dbias = dz if ctx.has_residual else None, sums[2] if ctx.has_bias else None
    return dx if ctx.p > 0 else dz, dresidual, dbias, sums[0], sums[1], None, None, None, None


_add_layer_norm.register_autograd(_differentiate, setup_context=_save)


def add_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    eps: float = 1e-12,
    return_sum: bool = False,
    twice: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm(residual + dropout(x + bias)), and what the next residual sum reads.

    That is the normalized sum in pre-LN blocks (`return_sum`), and the same result again in post-LN blocks (`twice`):
    one tensor for each of its two readers, on the same memory, whose gradients the kernel adds.

    Args:
        x: [..., N], contiguous; bf16, fp16 or fp32.
        weight, shift: [N], the norm's gain and bias.
        residual: [..., N] like x.
        bias: [N], added to x before dropout (that of the preceding linear layer).
        dropout: rate in [0, 1).
        seed: int64 [1] on x's device; drawn from the device's default generator where it is needed and absent.
        eps: added to the variance.

    Returns:
        y [..., N] in x's dtype, or (y, sum), or (y, y).

    Raises:
        ValueError: shapes, dtypes or rate do not fit, or both results are asked for.
    """
    _check(x, weight, shift, residual, bias, dropout)
    check(not (return_sum and twice), "return_sum and twice exclude each other; choose the one that is read.")
    if dropout > 0 and seed is None:
        seed = new_seed(x.device)
    plain = residual is None and bias is None and dropout == 0
    store_sum = not plain and (return_sum or torch.is_grad_enabled())
    flat = x.view(-1, x.shape[-1])
    y, z, _, _, second = _add_layer_norm(
        flat, None if residual is None else residual.view_as(flat), bias, weight, shift, seed if dropout > 0 else None,
        dropout, eps, store_sum,
    )  # fmt: skip
    if twice:
        first, again = read_twice(y, second)
        return first.view_as(x), again.view_as(x)
    if not return_sum:
        return y.view_as(x)
    return y.view_as(x), x if plain else z.view_as(x)


def _check(x, weight, shift, residual, bias, dropout):
    check(x.is_contiguous(), lambda: f"x has strides {x.stride()} for shape {tuple(x.shape)}; make it contiguous.")
    for name, vector in (("weight", weight), ("shift", shift), ("bias", bias)):
        check(
            vector is None or vector.shape == x.shape[-1:],
            lambda: (
                f"{name} has shape {tuple(vector.shape) if vector is not None else ()}; x of shape {tuple(x.shape)} "
                f"needs [{x.shape[-1]}]."
            ),
        )
    if residual is not None:
        check(
            residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous(),
            lambda: (
                f"residual is {residual.dtype} {tuple(residual.shape)}; it must be contiguous and like x, "
                f"{x.dtype} {tuple(x.shape)}."
            ),
        )
    check(0 <= dropout < 1, lambda: f"dropout is {dropout}; it must lie in [0, 1).")
