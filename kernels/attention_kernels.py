"""Triton kernels of attention: what they share, and the forward pass.

Legend: S longest sequence, D head size, M queries and N keys of a tile. `lse` is the row's log2-sum-exp2 of scaled
scores, so that P = exp2(scores * scale - lse).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_stacking.kernels._dropout import column_hash, row_hash, seed_key


@triton.jit
def _sequence(STARTS, sequence, longest, PADDED: tl.constexpr):
    """First token and length of a sequence: STARTS holds cumulative lengths, or lengths where PADDED."""
    if PADDED:
        start = sequence.to(tl.int64) * longest
        length = tl.load(STARTS + sequence)
    else:
        start = tl.load(STARTS + sequence).to(tl.int64)
        length = (tl.load(STARTS + sequence + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def _dot(a, b, UPCAST_DOT: tl.constexpr):
    if UPCAST_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(X, rows, length, cols, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of one head, [rows, BLOCK_D]; zeros beyond `length` if MASKED and beyond D."""
    at = X + (rows[:, None].to(tl.int64) * STRIDE + cols[None, :])
    if MASKED:
        return tl.load(at, mask=(rows[:, None] < length) & (cols[None, :] < D), other=0.0)
    if D < BLOCK_D:
        return tl.load(at, mask=cols[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def _store(X, values, rows, limit, cols, STRIDE: tl.constexpr, D: tl.constexpr):
    mask = (rows[:, None] < limit) & (cols[None, :] < D)
    tl.store(X + rows[:, None] * STRIDE + cols[None, :], values.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tiles(
    acc, peak, total, q, K, V, begin, end, length, rows, hashes, key, scale,
    D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, MASKED: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end); MASKED tiles may reach beyond the sequence or the diagonal."""
    cols = tl.arange(0, BLOCK_D)
    for n in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED else None):
        keys = n + tl.arange(0, BLOCK_N)
        k = _load(K, keys, length, cols, STRIDE, D, BLOCK_D, MASKED)
        scores = _dot(q, tl.trans(k), UPCAST_DOT)  # [M, N]
        if MASKED:
            visible = keys[None, :] < length
            if CAUSAL:
                visible = visible & (keys[None, :] <= rows[:, None])
            scores = tl.where(visible, scores, -1.0e30)
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        p = tl.math.exp2(scores * scale - new_peak[:, None])
        rescale = tl.math.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        v = _load(V, keys, length, cols, STRIDE, D, BLOCK_D, MASKED)
        if THRESHOLD > 0:
            # a factor, not a selection, which would be made after rounding, one 16-bit half at a time
            p = p * tl.where(hashes[:, None] * column_hash(key, keys)[None, :] >= THRESHOLD, 1.0, 0.0)
        acc += _dot(p.to(v.dtype), v, UPCAST_DOT)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["longest"])
def forward(
    QKV, STARTS, SEED, OUT, LSE, longest, tokens, scale, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head per program."""
    blocks = tl.cdiv(longest, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:  # long rows first, so that none is left for the end
        block = blocks - 1 - block
    head = tl.program_id(0) // blocks % H
    start, length = _sequence(STARTS, tl.program_id(0) // blocks // H, longest, PADDED)
    limit = longest if PADDED else length  # padded rows are written: zeros
    if block * BLOCK_M >= limit:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    base = QKV + start * (3 * H * D) + head * D
    q = _load(base, rows, length, cols, 3 * H * D, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    hashes = rows.to(tl.uint32)
    key = hashes
    if THRESHOLD > 0:
        key = seed_key(SEED)
        hashes = row_hash(key, (start + rows) * H + head)
    end = tl.minimum(length, (block + 1) * BLOCK_M) if CAUSAL else length
    whole = (tl.minimum(length, block * BLOCK_M) if CAUSAL else length) // BLOCK_N * BLOCK_N
    acc, peak, total = _forward_tiles(
        acc, peak, total, q, base + H * D, base + 2 * H * D, 0, whole, length, rows, hashes, key, scale,
        D, 3 * H * D, BLOCK_D, BLOCK_N, CAUSAL, THRESHOLD, False, UPCAST_DOT,
    )  # fmt: skip
    acc, peak, total = _forward_tiles(
        acc, peak, total, q, base + H * D, base + 2 * H * D, whole, end, length, rows, hashes, key, scale,
        D, 3 * H * D, BLOCK_D, BLOCK_N, CAUSAL, THRESHOLD, True, UPCAST_DOT,
    )  # fmt: skip
    valid = rows < length
    total = tl.where(valid & (total > 0.0), total, 1.0)  # padding sees no key
    acc = tl.where(valid[:, None], acc * (keep_scale / total)[:, None], 0.0)
    _store(OUT + start * (H * D) + head * D, acc, rows, limit, cols, H * D, D)
    tl.store(LSE + head.to(tl.int64) * tokens + start + rows, peak + tl.math.log2(total), mask=valid)
