"""Cross entropy of a linear layer's output: the head of masked language modelling, with or without its logits kept.

    x = h W^T + b                          lse = log sum_v exp(x_v)
    loss = lse - (1 - e) x_t - e mean_v(x_v) + z lse^2
    dx = g ((1 + 2 z lse) softmax(x) - (1 - e) [v = t] - e / V)
    dh = dx W          dW = dx^T h          db = sum_rows(dx)

Where the logits take few bytes they are kept, which costs less time (kept_logits.py). Else, here:

Forward: a matrix product whose epilogue reduces each tile of logits to the row's maximum, sum of exponentials, sum
and target logit; a second kernel merges the tiles. Backward: for one slice of the vocabulary at a time the product is
computed again, its epilogue writes dx in 16 bits, and two library products turn it into dh (summed in fp32) and the
slice's final dW and db. So memory is one slice, not the logits, and every sum has one order: no atomics. Its operator
is opaque to torch.compile, which would turn products written in place into products and copies. After "Cut Your
Losses" (Wijmans et al. 2024), with the slice in place of its fused second and third products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op

from ds_stacking.kernels._launch import Kernel, check, launch, readable, runs_kernels
from ds_stacking.kernels._product import product, product_configs, tile_grid, tile_of, tile_width
from ds_stacking.kernels.kept_logits import kept_cross_entropy

KEPT_BYTES = 512 * 2**20
"""Logits of so many bytes or fewer are kept: those of 8,794 rows of BERT's vocabulary in bf16."""
SLICE = 8192
"""Most columns of the vocabulary whose gradient of the logits exists at one time."""

# M rows (masked tokens), K hidden size, V vocabulary


@triton.jit(do_not_specialize=["rows"])
def _statistics(
    H, W, BIAS, TARGET, TILES, rows, columns, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Per row and tile of columns: maximum, sum of exponentials, sum, target logit; TILES [tiles, 4, M] fp32."""
    m, n = tile_of(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    x = product(H, W, row, column, rows, columns, K, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST_DOT)
    x += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = column[None, :] < columns
    target = tl.load(TARGET + row, mask=row < rows, other=-1)
    peak = tl.maximum(tl.max(tl.where(inside, x, -float("inf")), axis=1), -3e38)  # finite: x may be -inf in all
    at = TILES + n.to(tl.int64) * 4 * rows + row
    tl.store(at, peak, mask=row < rows)
    tl.store(at + rows, tl.sum(tl.where(inside, tl.exp(x - peak[:, None]), 0.0), axis=1), mask=row < rows)
    tl.store(at + 2 * rows, tl.sum(tl.where(inside, x, 0.0), axis=1), mask=row < rows)
    hit = inside & (column[None, :] == target[:, None])
    tl.store(at + 3 * rows, tl.sum(tl.where(hit, x, 0.0), axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _merge(
    TILES, TARGET, LOSS, LSE, rows, columns, tiles, ignore, smoothing, z_loss, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Per row: log-sum-exp and loss from the tiles' figures; 0 on ignored rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    exponentials = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    hit = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile[:, None] < tiles) & (row[None, :] < rows)
        at = TILES + tile[:, None].to(tl.int64) * 4 * rows + row[None, :]
        peaks = tl.load(at, mask=mask, other=-float("inf"))
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        new_peak = tl.where(row < rows, new_peak, 0.0)
        sums = tl.load(at + rows, mask=mask, other=0.0) * tl.exp(peaks - new_peak[None, :])
        exponentials = exponentials * tl.exp(peak - new_peak) + tl.sum(sums, axis=0)
        total += tl.sum(tl.load(at + 2 * rows, mask=mask, other=0.0), axis=0)
        hit += tl.sum(tl.load(at + 3 * rows, mask=mask, other=0.0), axis=0)
        peak = new_peak
    lse = peak + tl.log(tl.where(row < rows, exponentials, 1.0))
    spread = tl.where(smoothing > 0.0, smoothing * total / columns, 0.0)  # without it a total of -inf is no matter
    loss = lse - (1.0 - smoothing) * hit - spread + z_loss * lse * lse
    target = tl.load(TARGET + row, mask=row < rows, other=0)
    tl.store(LOSS + row, tl.where(target == ignore, 0.0, loss), mask=row < rows)
    tl.store(LSE + row, lse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "begin"])
def _gradient(
    H, W, BIAS, TARGET, LSE, SCALE, DX, rows, begin, columns, stride, vocabulary, ignore, smoothing, z_loss,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """A tile of dx for vocabulary columns [begin, begin + columns); DX is [M, stride]."""
    m, n = tile_of(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = begin.to(tl.int64)
    x = product(H, W + first * K, row, column, rows, columns, K, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST_DOT)
    x += tl.load(BIAS + first + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    target = tl.load(TARGET + row, mask=row < rows, other=ignore)
    lse = tl.load(LSE + row, mask=row < rows, other=0.0)
    scale = tl.where(target == ignore, 0.0, tl.load(SCALE + row, mask=row < rows, other=0.0))
    dx = tl.exp(x - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None] - smoothing / vocabulary
    dx -= tl.where(column[None, :] + begin == target[:, None], 1.0 - smoothing, 0.0)
    at = DX + row[:, None].to(tl.int64) * stride + column[None, :]
    dx = (dx * scale[:, None]).to(DX.dtype.element_ty)
    tl.store(at, dx, mask=(row[:, None] < rows) & (column[None, :] < columns))


STATISTICS = Kernel(fn=_statistics, configs=product_configs, key=("rows", "columns"))
MERGE = Kernel(fn=_merge, configs=lambda target, meta: [triton.Config({"BLOCK_M": 32, "BLOCK_T": 64}, num_warps=4)])
GRADIENT = Kernel(fn=_gradient, configs=product_configs, key=("rows", "columns"))


@triton_op("ds_stacking::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [M] fp32, log-sum-exp [M] fp32)."""
    if not runs_kernels(h):
        return _forward_reference(h, weight, bias, target, ignore_index, label_smoothing, z_loss)
    (rows, inner), columns, width = h.shape, weight.shape[0], tile_width(h.element_size())
    count = triton.cdiv(columns, width)
    tiles = torch.empty(count, 4, rows, dtype=torch.float32, device=h.device)
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=h.device) for _ in range(2))
    launch(
        STATISTICS, tile_grid(rows, columns, width), h, weight, bias, target, tiles, rows, columns, K=inner,
        BLOCK_N=width,
    )  # fmt: skip
    launch(
        MERGE, lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]),), tiles, target, loss, lse, rows, columns, count,
        ignore_index, label_smoothing, z_loss,
    )  # fmt: skip
    return loss, lse


def _sliced_backward(
    dloss: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dh [M, K], dW [V, K], db [V])."""
    (rows, inner), vocabulary, width = h.shape, weight.shape[0], tile_width(h.element_size())
    slices = triton.cdiv(vocabulary, SLICE)
    stride = triton.cdiv(triton.cdiv(vocabulary, slices), 128) * 128
    buffer = torch.empty(rows, stride, dtype=h.dtype, device=h.device)
    dh = torch.zeros(rows, inner, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    for begin in range(0, vocabulary, stride):
        columns = min(stride, vocabulary - begin)
        dx, part = buffer.narrow(1, 0, columns), weight.narrow(0, begin, columns)
        if runs_kernels(h):
            launch(
                GRADIENT, tile_grid(rows, columns, width), h, weight, bias, target, lse, dloss, dx, rows, begin,
                columns, stride, vocabulary, ignore_index, label_smoothing, z_loss, K=inner, BLOCK_N=width,
            )  # fmt: skip
        else:
            dx = _gradient_reference(
                h, part, bias.narrow(0, begin, columns), target - begin, lse, dloss * (target != ignore_index),
                vocabulary, label_smoothing, z_loss,
            )  # fmt: skip
        dh = _add_product(dh, dx, part)
        torch.mm(dx.mT, h, out=dweight.narrow(0, begin, columns))
        torch.sum(dx, 0, out=dbias.narrow(0, begin, columns))
    return dh.to(h.dtype), dweight, dbias


_linear_cross_entropy_backward = custom_op(
    "ds_stacking::linear_cross_entropy_backward", _sliced_backward, mutates_args=()
)


@_linear_cross_entropy_backward.register_fake
def _(dloss, h, weight, bias, *rest):
    # torch 2.11 cannot tell the shape of addmm with out_dtype; what is recorded on meta tensors has no need of it
    if h.is_meta:
        return _sliced_backward(dloss, h, weight, bias, *rest)
    return torch.empty_like(h), torch.empty_like(weight), torch.empty_like(bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a b in fp32, whatever the type of a and b."""
    if a.is_cuda and a.dtype != total.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype)
    return torch.addmm(total, a.to(total.dtype), b.to(total.dtype))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward_reference(h, weight, bias, target, ignore_index, label_smoothing, z_loss):
    x = _wide(h) @ _wide(weight).mT + _wide(bias)
    lse, ignored = x.logsumexp(1), target == ignore_index
    hit = x.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    spread = label_smoothing * x.mean(1) if label_smoothing > 0 else 0.0  # without it a mean of -inf is no matter
    loss = lse - (1 - label_smoothing) * hit - spread + z_loss * lse.square()
    return loss.masked_fill(ignored, 0.0), lse


def _gradient_reference(h, weight, bias, target, lse, scale, vocabulary, label_smoothing, z_loss):
    x = _wide(h) @ _wide(weight).mT + _wide(bias)
    dx = (x - lse[:, None]).exp_() * (1 + 2 * z_loss * lse[:, None]) - label_smoothing / vocabulary
    inside = ((target >= 0) & (target < weight.shape[0]))[:, None].to(dx.dtype)
    dx.scatter_add_(1, target.clamp(0, weight.shape[0] - 1)[:, None], inside * (label_smoothing - 1))
    return (dx * scale[:, None]).to(h.dtype)


def _save(ctx, inputs, output):
    h, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(h, weight, bias, target, output[1])


def _differentiate(ctx, dloss, _):
    gradients = _linear_cross_entropy_backward(dloss.contiguous(), *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    keep_logits: bool | None = None,
) -> torch.Tensor:
    """Sum over rows of the cross entropy of `h @ weight.T + bias`; divide it by the number of targets for the mean.

    Args:
        h: [M, K], contiguous; bf16, fp16 or fp32. Pass only the rows that have a target: each row costs the same.
        weight: [V, K] like h.
        bias: [V] like h, or None.
        target: int64 [M] in [0, V), or ignore_index.
        label_smoothing: weight of the uniform distribution, in [0, 1).
        z_loss: weight of the squared log-sum-exp (Chowdhery et al. 2022, PaLM, section 5).
        keep_logits: hold them, rounded to h's dtype, until the backward pass; a product less and M * V elements more.
            None: where they take KEPT_BYTES at most, and not in fp16, where small gradients would round to zero before
            a loss scale reaches them. In bf16 it holds for logits up to 20 or so in size, with gradients within 1 %;
            the error grows in proportion to them (kept_logits.py), and False is right for any.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: shapes, dtypes or weights do not fit; on a CPU also targets out of range.
    """
    _check(h, weight, bias, target, ignore_index, label_smoothing)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if keep_logits is None:
        keep_logits = keeps_logits(h.shape[0], weight.shape[0], h.dtype)
    if keep_logits:
        return kept_cross_entropy(h, weight, bias, target, ignore_index, label_smoothing, z_loss)
    return _linear_cross_entropy(h, weight, bias, target, ignore_index, label_smoothing, z_loss)[0].sum()


def keeps_logits(rows: int, vocabulary: int, dtype: torch.dtype) -> bool:
    """Whether `linear_cross_entropy` keeps so many logits by itself."""
    return dtype != torch.float16 and rows * vocabulary * dtype.itemsize <= KEPT_BYTES


def _check(h, weight, bias, target, ignore_index, label_smoothing):
    check(h.dim() == 2 and h.is_contiguous(), lambda: f"h has shape {tuple(h.shape)}; it must be contiguous [M, K].")
    check(
        weight.dim() == 2 and weight.shape[1] == h.shape[1] and weight.is_contiguous(),
        lambda: (
            f"weight has shape {tuple(weight.shape)}; h of shape {tuple(h.shape)} needs contiguous [V, {h.shape[1]}]."
        ),
    )
    check(weight.dtype == h.dtype, lambda: f"weight is {weight.dtype} and h {h.dtype}; cast the one.")
    if bias is not None:
        check(
            bias.shape == weight.shape[:1] and bias.dtype == h.dtype,
            lambda: f"bias is {bias.dtype} {tuple(bias.shape)}; it must be {h.dtype} [{weight.shape[0]}].",
        )
    check(
        target.shape == h.shape[:1] and target.dtype == torch.int64,
        lambda: f"target is {target.dtype} {tuple(target.shape)}; it must be torch.int64 [{h.shape[0]}].",
    )
    check(0 <= label_smoothing < 1, lambda: f"label_smoothing is {label_smoothing}; it must lie in [0, 1).")
    if readable(target) and target.numel():
        real = target[target != ignore_index]
        check(
            real.numel() == 0 or 0 <= int(real.min()) <= int(real.max()) < weight.shape[0],
            lambda: (
                f"target reaches from {int(target.min())} to {int(target.max())}; "
                f"it must lie in [0, {weight.shape[0]}) or be {ignore_index}."
            ),
        )
