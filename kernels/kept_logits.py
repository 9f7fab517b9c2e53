"""Cross entropy of a linear layer's output that keeps its logits, and turns them into their gradient at once.

Formulas and notation are those of linear_cross_entropy.py. Forward: one library product writes x without its bias,
rounded to the type of h; a kernel reads each row twice, the second time from L2, and writes dx in its place, for a
gradient of the loss of 1. Backward: two library products and the column sums of db; the true gradient of the loss, one
number, is multiplied with their small operands. 3 products where linear_cross_entropy.py takes 4, M V elements of
memory, read or written 5 times beside the products.

Logits in 16 bits are what F.cross_entropy gets under autocast: rounding to bf16 moves a logit x by |x| / 256 at most,
one of 8 to 16 by 0.03, and its probability by as great a part of itself. On random inputs that puts gradients off by
1 % of their largest element where logits reach 20, by 5 % at 60 and 20 to 26 % at 1,800, with z-loss and label
smoothing or without; computed again in fp32 they are off by 0.4 % throughout. fp32 logits would double the bytes, and
their gradient, an operand of products, needs 16 bits anyway. Operators are opaque to torch.compile, for which a
product cannot write rows of a padded length in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import custom_op

from ds_stacking.kernels._launch import Kernel, launch, runs_kernels


@triton.jit(do_not_specialize=["rows"])
def _cross_entropy(
    X, BIAS, TARGET, LOSS, rows, columns, stride, ignore, smoothing, z_loss, BLOCK_V: tl.constexpr
):  # fmt: skip
    """One row: its loss, 0 if ignored, and dx in place of x, 0 beyond `columns`; X is [M, stride], BIAS [stride]."""
    row = tl.program_id(0)
    start = X + row.to(tl.int64) * stride
    target = tl.load(TARGET + row)
    column = tl.arange(0, BLOCK_V)
    peaks = tl.full([BLOCK_V], -3e38, tl.float32)  # finite: a lane that sees no column subtracts it from itself
    exponentials = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    hit = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, columns, BLOCK_V):
        at = first + column
        inside = at < columns
        # masks of a multiple of 64, so that 8 elements are loaded at once
        x = tl.load(start + at, mask=at < stride, other=0.0).to(tl.float32)
        x += tl.load(BIAS + at, mask=at < stride, other=0.0).to(tl.float32)
        total += tl.where(inside, x, 0.0)
        hit += tl.where(at == target, x, 0.0)
        x = tl.where(inside, x, -3e38)
        peak = tl.maximum(peaks, x)
        exponentials = exponentials * tl.exp(peaks - peak) + tl.exp(x - peak)
        peaks = peak
    peak = tl.max(peaks, axis=0)
    lse = peak + tl.log(tl.sum(exponentials * tl.exp(peaks - peak), axis=0))
    spread = smoothing * tl.sum(total, axis=0) / columns
    spread = tl.where(smoothing > 0.0, spread, 0.0)  # without smoothing a total of -inf is no matter
    loss = lse - (1.0 - smoothing) * tl.sum(hit, axis=0) - spread
    kept = target != ignore
    tl.store(LOSS + row, tl.where(kept, loss + z_loss * lse * lse, 0.0))
    # the reductions above wait for every thread's reading, so that x may be overwritten
    for first in range(0, stride, BLOCK_V):
        at = first + column
        inside = at < columns
        x = tl.load(start + at, mask=at < stride, other=0.0).to(tl.float32)
        x += tl.load(BIAS + at, mask=at < stride, other=0.0).to(tl.float32)
        dx = tl.exp(x - lse) * (1.0 + 2.0 * z_loss * lse) - smoothing / columns
        dx -= tl.where(at == target, 1.0 - smoothing, 0.0)
        tl.store(start + at, tl.where(inside & kept, dx, 0.0).to(X.dtype.element_ty), mask=at < stride)


CROSS_ENTROPY = Kernel(fn=_cross_entropy, configs=lambda target, meta: [triton.Config({"BLOCK_V": 2048}, num_warps=8)])


def _forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the losses, fp32; dx [M, V rounded up to 64], zero beyond V)."""
    rows, columns = h.shape[0], weight.shape[0]
    stride = triton.cdiv(columns, 64) * 64  # of unaligned rows a product would be slow
    dx = torch.empty(rows, stride, dtype=h.dtype, device=h.device)
    torch.mm(h, weight.mT, out=dx.narrow(1, 0, columns))
    if runs_kernels(h):
        loss = torch.empty(rows, dtype=torch.float32, device=h.device)
        launch(
            CROSS_ENTROPY, (rows,), dx, F.pad(bias, (0, stride - columns)), target, loss, rows, columns, stride,
            ignore_index, label_smoothing, z_loss,
        )  # fmt: skip
    else:
        dx.narrow(1, columns, stride - columns).zero_()
        loss = _reference(dx.narrow(1, 0, columns), bias, target, ignore_index, label_smoothing, z_loss)
    return loss.sum(), dx


def _backward(
    dloss: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dh [M, K], dW [V, K], db [V]) for the scalar `dloss`, fp32."""
    dx = dx.narrow(1, 0, weight.shape[0])
    dh = (dx @ weight).mul_(dloss)
    dweight = dx.mT @ (h * dloss)
    dbias = dx.sum(0, dtype=torch.promote_types(h.dtype, torch.float32)) * dloss
    return dh, dweight, dbias.to(h.dtype)


_forward_op = custom_op("ds_stacking::kept_cross_entropy", _forward, mutates_args=())
_forward_op.register_fake(_forward)
_backward_op = custom_op("ds_stacking::kept_cross_entropy_backward", _backward, mutates_args=())
_backward_op.register_fake(_backward)


def _reference(x, bias, target, ignore_index, label_smoothing, z_loss):
    """The losses; x becomes dx."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) + bias
    lse, kept = wide.logsumexp(1), target != ignore_index
    at = torch.where(kept, target, 0)[:, None]
    spread = label_smoothing * wide.mean(1) if label_smoothing > 0 else 0.0  # without it a mean of -inf is no matter
    loss = lse - (1 - label_smoothing) * wide.gather(1, at)[:, 0] - spread + z_loss * lse**2
    dx = (wide - lse[:, None]).exp_() * (1 + 2 * z_loss * lse[:, None]) - label_smoothing / x.shape[1]
    dx.scatter_add_(1, at, torch.full_like(at, label_smoothing - 1, dtype=dx.dtype))
    x.copy_(dx * kept[:, None])
    return torch.where(kept, loss, 0.0)


def _save(ctx, inputs, output):
    h, weight, *_ = inputs
    ctx.save_for_backward(h, weight, output[1])


def _differentiate(ctx, dloss, _):
    return *_backward_op(dloss, *ctx.saved_tensors), None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def kept_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """`linear_cross_entropy` with `keep_logits`."""
    return _forward_op(h, weight, bias, target, ignore_index, label_smoothing, z_loss)[0]
