"""Cast to an 8-bit float with one scale for the tensor, row by row and transposed in one pass.

    scale = 2^k, the largest with max|x| * scale <= 1.75 * 2^L, the format's largest number
    rows = fp8(x * scale),  columns = rows^T

e4m3 has L = 8 (448), e5m2 has L = 15 (57,344). A scale by a power of two is exact, so each element is rounded once.
The matrix units multiply 8-bit operands only where both lie along the axis that is summed: hence the transposed copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op
from torch.nn import functional as F

from ds_stacking.kernels._launch import Kernel, check, launch, runs_kernels

# M rows, N columns; P = M rounded up to a multiple of 16
EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
"""L by format."""
ROUND_UP = tl.constexpr(0x1FFFFF)
"""Added to the bits of an fp32 number it carries into the exponent where the mantissa is beyond 1.75."""
SMALLEST = tl.constexpr(27)
"""Added to L: the biased exponent from which on scales grow no more, at 2^100; the inverse of a larger one times that
of the other operand might be 0."""


@triton.jit(do_not_specialize=["rows", "padded"])
def _cast(
    X, LARGEST, ROWS, COLUMNS, INVERSE, rows, padded,
    N: tl.constexpr, L: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    bits = tl.load(LARGEST).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    power = tl.maximum((bits + ROUND_UP) >> 23, L + SMALLEST)
    scale = ((254 + L - power) << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        inverse = ((power - L) << 23).to(tl.float32, bitcast=True)
        tl.store(INVERSE, tl.where(power < 255, inverse, float("nan")))
    at = row[:, None].to(tl.int64) * N + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < N)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if STRAIGHT:
        tl.store(ROWS + at, (x * scale).to(ROWS.dtype.element_ty), mask=inside)
    if TURNED:
        turned = tl.trans((x * scale).to(COLUMNS.dtype.element_ty))
        at = col[:, None].to(tl.int64) * padded + row[None, :]
        tl.store(COLUMNS + at, turned, mask=(col[:, None] < N) & (row[None, :] < padded))


CAST = Kernel(
    fn=_cast, configs=lambda target, meta: [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=1)]
)


def reference(
    x: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and inverse scale by PyTorch's own operations, the kernel's to the bit."""
    exponent = EXPONENTS[dtype]
    power = ((amax.view(torch.int32) & 0x7FFFFFFF) + ROUND_UP.value) >> 23
    power = power.clamp(min=exponent + SMALLEST.value)
    scale = ((254 + exponent - power) << 23).view(torch.float32)
    inverse = ((power - exponent) << 23).view(torch.float32).masked_fill(power >= 255, torch.nan)
    rows = (x.float() * scale).to(dtype)
    # as bytes, which have every operation; 0 is 0 in both formats
    columns = F.pad(rows.view(torch.uint8), (0, 0, 0, -len(x) % 16)).t().contiguous().view(dtype)
    return rows, columns, inverse


@triton_op("ds_stacking::cast_fp8", mutates_args=())
def _cast_fp8(
    x: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, straight: bool, turned: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    padded = (rows + 15) // 16 * 16
    if not runs_kernels(x):
        straight_copy, turned_copy, inverse = reference(x, amax, dtype)
        none = x.new_empty(0, 0, dtype=dtype)
        return straight_copy if straight else none, turned_copy if turned else none.clone(), inverse
    out = x.new_empty((rows, width) if straight else (0, 0), dtype=dtype)
    columns = x.new_empty((width, padded) if turned else (0, 0), dtype=dtype)
    inverse = x.new_empty((), dtype=torch.float32)
    launch(
        CAST, lambda meta: (max(1, triton.cdiv(padded, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"])),),
        x, amax, out, columns, inverse, rows, padded,
        N=width, L=EXPONENTS[dtype], STRAIGHT=straight, TURNED=turned,
    )  # fmt: skip
    return out, columns, inverse


def largest_magnitude(x: torch.Tensor) -> torch.Tensor:
    """max|x|, fp32, no dimensions; NaN where an element is, 0 of none."""
    return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) if x.numel() else x.new_zeros(()).float()


def cast_fp8(
    x: torch.Tensor,
    amax: torch.Tensor,
    dtype: torch.dtype,
    *,
    straight: bool = True,
    turned: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x` in 8 bits.

    Args:
        x: [M, N], contiguous, bf16 or fp32.
        amax: max|x|, fp32, no dimensions, on the device of `x`.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        straight: whether the first copy is made.
        turned: whether the second copy is made.

    Returns:
        The copy [M, N]; the transposed copy [N, P], zeros beyond M; what multiplies both back, fp32, no dimensions,
        NaN where `amax` is not finite (or 1.75 * 2^127 or more). A copy that is not made is [0, 0].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check(
        x.dim() == 2 and x.is_contiguous() and x.dtype in (torch.bfloat16, torch.float32),
        f"x is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; it must be contiguous "
        f"bf16 or fp32 [M, N].",
    )
    check(
        amax.shape == () and amax.dtype == torch.float32,
        f"amax is {amax.dtype} {tuple(amax.shape)}; it must be torch.float32 without dimensions.",
    )
    check(dtype in EXPONENTS, f"dtype is {dtype}; it must be torch.float8_e4m3fn or torch.float8_e5m2.")
    return _cast_fp8(x, amax, dtype, straight, turned)
