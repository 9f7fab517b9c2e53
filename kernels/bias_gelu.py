"""GELU after a bias, alone or in the epilogue of the linear layer; erf and tanh forms, forward and backward.

    y = u Phi(u), u = x + b            dx = dy (Phi(u) + u phi(u))            db = sum_rows(dx)
    tanh form: y = u (1 + tanh(c u + d u^3)) / 2, c = sqrt(2 / pi), d = 0.044715 c

For 16-bit inputs erf's two forms are polynomials in a = |u| for [0, 13.3], whose exponentials carry the tails, so that
relative errors hold where Phi is 1e-38 as where it is 1/2 (the form 1 + erf has none left of its digits at u = -6):

    Phi(-a) = 2^P7(a)                  P7 fits log2 Phi(-a) to 8e-4, a relative error of 6e-4
    slope(-a) = exp(-a^2 / 2) Q9(a)    Q9 fits (M(a) - a) / sqrt(2 pi), M Mills' ratio, to 8e-4 of itself

Both are minimax fits by Lawson's iteration (1961). fp32 inputs take the library's erf.

`bias_gelu` is one pass each way, the sum of db included: 2u bytes forward and 3u backward, u being one row of the
feed-forward layer. `linear_gelu` also saves the forward pass's reading of u, since the product's epilogue writes both
u and y; it pays where that product comes near the library's speed. Hendrycks and Gimpel 2016.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import triton_op

from ds_stacking.kernels._columns import sum_partials
from ds_stacking.kernels._launch import Kernel, check, launch, multiprocessors, runs_kernels
from ds_stacking.kernels._product import product, product_configs, tile_grid, tile_of, tile_width

Form = Literal["none", "tanh"]

# M rows (tokens), N columns (feed-forward width), K hidden size


@triton.jit
def _gelu(u, TANH: tl.constexpr, EXACT: tl.constexpr):
    if TANH:
        # tanh(v) = 1 - 2 / (exp(2 v) + 1), exact at both ends
        v = 0.7978845608028654 * (u + 0.044715 * u * u * u)
        return u * (1.0 - 1.0 / (tl.exp(2.0 * v) + 1.0))
    if EXACT:
        return 0.5 * u * (1.0 + tl.math.erf(u * 0.7071067811865476))
    a = tl.minimum(tl.abs(u), 14.0)  # where Phi(-a) is 0
    p = -3.1133996003518405e-07 * a + 1.7473343177698553e-05
    p = p * a - 0.000412817025789991
    p = p * a + 0.005410486366599798
    p = p * a - 0.04422212764620781
    p = p * a - 0.4732973277568817
    p = p * a - 1.142687439918518
    p = p * a - 1.0008091926574707
    return 0.5 * (u + tl.abs(u)) - a * tl.exp2(p)


@triton.jit
def _gelu_slope(u, TANH: tl.constexpr, EXACT: tl.constexpr):
    if TANH:
        square = u * u
        v = 0.7978845608028654 * u * (1.0 + 0.044715 * square)
        t = 1.0 - 2.0 / (tl.exp(2.0 * v) + 1.0)
        return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * square)
    if EXACT:
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
        return 0.5 * (1.0 + tl.math.erf(u * 0.7071067811865476)) + u * density
    a = tl.minimum(tl.abs(u), 14.0, propagate_nan=tl.PropagateNan.ALL)  # else NaN would become 14, its slope 1
    q = -2.7171980221396552e-08 * a + 1.6344594087058795e-06
    q = q * a - 4.147718573221937e-05
    q = q * a + 0.0005803594249300659
    q = q * a - 0.004930330440402031
    q = q * a + 0.026596704497933388
    q = q * a - 0.09395613521337509
    q = q * a + 0.22627978026866913
    q = q * a - 0.7914251685142517
    q = q * a + 0.49960607290267944
    slope = tl.exp2(-0.7213475204444817 * a * a) * q
    return tl.where(u < 0, slope, 1.0 - slope)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    X, BIAS, Y, rows, N: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(N, BLOCK_N)
    col = tl.program_id(0) % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)
    mask = (row[:, None] < rows) & (col[None, :] < N)
    at = row[:, None].to(tl.int64) * N + col[None, :]
    u = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    u += tl.load(BIAS + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, _gelu(u, TANH, X.dtype.element_ty == tl.float32), mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward(
    DY, X, BIAS, DX, PARTIALS, rows, programs, N: tl.constexpr, TANH: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of columns; tiles of rows with a stride of `programs`."""
    chunks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    slot = tl.program_id(0) // chunks
    col = tl.program_id(0) % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < N
    stride = tl.full([], ROWS * N, tl.int64)
    at = tl.arange(0, ROWS)[:, None] * N + col[None, :]
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + col, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(slot, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row[:, None] < rows) & inside[None, :]
        start = tile * stride
        u = tl.load(X + start + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]  # [ROWS, BLOCK_N]
        dy = tl.load(DY + start + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
        dx = dy * _gelu_slope(u, TANH, X.dtype.element_ty == tl.float32)
        tl.store(DX + start + at, dx, mask=mask)
        total += tl.sum(dx, axis=0)
    tl.store(PARTIALS + slot.to(tl.int64) * N + col, total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    X, W, BIAS, U, Y, rows, N: tl.constexpr, K: tl.constexpr, TANH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    m, n = tile_of(rows, N, BLOCK_M, BLOCK_N, GROUP)
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = n * BLOCK_N + tl.arange(0, BLOCK_N)
    u = product(X, W, row, col, rows, N, K, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST_DOT)
    u += tl.load(BIAS + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    mask = (row[:, None] < rows) & (col[None, :] < N)
    at = row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(U + at, u.to(U.dtype.element_ty), mask=mask)
    tl.store(Y + at, _gelu(u, TANH, X.dtype.element_ty == tl.float32).to(Y.dtype.element_ty), mask=mask)


COLUMNS = 512
"""Columns of a tile."""
BACKWARD_PROGRAMS = 7
"""Those of the backward kernel that stay resident on a multiprocessor of sm_90, by kernels/compiled."""


def _tiles(target: str, meta: dict[str, Any]) -> list[triton.Config]:
    return [triton.Config({"ROWS": 4, "BLOCK_N": COLUMNS}, num_warps=4)]


FORWARD = Kernel(fn=_forward, configs=_tiles, key=("rows",))
BACKWARD = Kernel(fn=_backward, configs=_tiles, key=("rows",))
LINEAR = Kernel(fn=_linear, configs=product_configs, key=("rows",))


@triton_op("ds_stacking::bias_gelu", mutates_args=())
def _bias_gelu(x: torch.Tensor, bias: torch.Tensor, tanh: bool) -> torch.Tensor:
    if not runs_kernels(x):
        return _reference(x + bias, tanh)
    rows, width = x.shape
    y = torch.empty_like(x)
    launch(
        FORWARD, lambda meta: (triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(width, meta["BLOCK_N"]),), x, bias, y,
        rows, N=width, TANH=tanh,
    )  # fmt: skip
    return y


@triton_op("ds_stacking::gelu_backward", mutates_args=())
def _gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [M, N], its column sums [N])."""
    if not runs_kernels(dy):
        dx = torch.ops.aten.gelu_backward(dy, x if bias is None else x + bias, approximate="tanh" if tanh else "none")
        return dx, dx.sum(0)
    rows, width = dy.shape
    # as many for every chunk of columns, all of them resident
    chunks = triton.cdiv(width, COLUMNS)
    programs = max(1, min(triton.cdiv(rows, 8), BACKWARD_PROGRAMS * multiprocessors(dy.device) // chunks))
    dx = torch.empty_like(dy)
    partials = torch.empty(programs, 1, width, dtype=torch.float32, device=dy.device)
    launch(
        BACKWARD, lambda meta: (programs * triton.cdiv(width, meta["BLOCK_N"]),), dy, x, dy if bias is None else bias,
        dx, partials, rows, programs, N=width, TANH=tanh, HAS_BIAS=bias is not None,
    )  # fmt: skip
    return dx, sum_partials(partials, dy.dtype).view(width)


@triton_op("ds_stacking::linear_gelu", mutates_args=())
def _linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [M, N], u [M, N])."""
    if not runs_kernels(x):
        u = F.linear(x, weight, bias)
        return _reference(u, tanh), u
    (rows, inner), width = x.shape, weight.shape[0]
    u, y = (torch.empty(rows, width, dtype=x.dtype, device=x.device) for _ in range(2))
    columns = tile_width(x.element_size())
    launch(
        LINEAR, tile_grid(rows, width, columns), x, weight, bias, u, y, rows, N=width, K=inner, TANH=tanh,
        BLOCK_N=columns,
    )  # fmt: skip
    return y, u


def _reference(u: torch.Tensor, tanh: bool) -> torch.Tensor:
    return F.gelu(u, approximate="tanh" if tanh else "none")


def _save(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx, dy):
    dx, dbias = _gelu_backward(dy.contiguous(), *ctx.saved_tensors, ctx.tanh)
    return dx, dbias, None


def _save_linear(ctx, inputs, output):
    x, weight, _, ctx.tanh = inputs
    ctx.save_for_backward(x, weight, output[1])


def _differentiate_linear(ctx, dy, _):
    x, weight, u = ctx.saved_tensors
    du, dbias = _gelu_backward(dy.contiguous(), u, None, ctx.tanh)
    return du @ weight, du.mT @ x, dbias, None


_bias_gelu.register_autograd(_differentiate, setup_context=_save)
_linear_gelu.register_autograd(_differentiate_linear, setup_context=_save_linear)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, approximate: Form = "none") -> torch.Tensor:
    """GELU(x + bias).

    Args:
        x: [..., N], contiguous; bf16, fp16 or fp32.
        bias: [N] like x.
        approximate: "none" (erf) or "tanh", as in torch.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(x, bias, x.shape[-1], approximate)
    return _bias_gelu(x.view(-1, x.shape[-1]), bias, approximate == "tanh").view_as(x)


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, approximate: Form = "none"
) -> torch.Tensor:
    """GELU(x @ weight.T + bias) in one kernel; arguments as for `bias_gelu`, x [..., K], weight [N, K]."""
    check(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.is_contiguous(),
        lambda: (
            f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs contiguous [N, {x.shape[-1]}]."
        ),
    )
    _check(x, bias, weight.shape[0], approximate)
    y = _linear_gelu(x.view(-1, x.shape[-1]), weight, bias, approximate == "tanh")[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x, bias, width, approximate):
    check(x.is_contiguous(), lambda: f"x has strides {x.stride()} for shape {tuple(x.shape)}; make it contiguous.")
    check(
        bias.shape == (width,) and bias.dtype == x.dtype,
        lambda: f"bias is {bias.dtype} {tuple(bias.shape)}; it must be {x.dtype} [{width}].",
    )
    check(approximate in ("none", "tanh"), lambda: f"approximate is {approximate!r}; it must be 'none' or 'tanh'.")
