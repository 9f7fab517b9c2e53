"""Triton kernels of attention of selected queries to all tokens of their sequences.

A program takes queries of one sequence: ORDER lists rows of the selection sorted by token, TOKENS their tokens, and
BOUNDS where each sequence's begin in both. Dropout is that of the token's row, so the mask is a part of the one that
attention of all queries has. Rows beyond a sequence's last repeat row 0 and are not stored.

Legend: R selected queries, M of them in a tile, N keys of a tile; lse and delta are [H, R] in the selection's order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_stacking.kernels._dropout import column_hash, row_hash, seed_key
from ds_stacking.kernels.attention_backward_kernels import _query_tiles
from ds_stacking.kernels.attention_kernels import _dot, _forward_tiles, _load, _sequence, _store


@triton.jit
def _queries(BOUNDS, sequence):
    """First place in ORDER and number of a sequence's selected queries."""
    first = tl.load(BOUNDS + sequence)
    return first, tl.load(BOUNDS + sequence + 1) - first


@triton.jit
def _hashes(TOKENS, at, inside, key, head, H: tl.constexpr, THRESHOLD: tl.constexpr):
    """Row hashes of the queries at places `at` of ORDER; anything without dropout."""
    if THRESHOLD > 0:
        tokens = tl.load(TOKENS + at, mask=inside, other=0)
        return row_hash(key, tokens * H + head)
    return at.to(tl.uint32)


@triton.jit
def _store_rows(X, values, rows, inside, cols, STRIDE: tl.constexpr, D: tl.constexpr):
    mask = inside[:, None] & (cols[None, :] < D)
    tl.store(X + rows[:, None] * STRIDE + cols[None, :], values.to(X.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["longest", "selected"])
def selected_forward(
    Q, KV, STARTS, BOUNDS, ORDER, TOKENS, SEED, OUT, LSE, longest, selected, scale, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """One tile of selected queries of one head per program; programs that find none end."""
    blocks = tl.cdiv(longest, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    first, many = _queries(BOUNDS, sequence)
    if block * BLOCK_M >= many:
        return
    start, length = _sequence(STARTS, sequence, longest, False)
    here = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = here < many
    rows = tl.load(ORDER + first + here, mask=inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    base = KV + start * (2 * H * D) + head * D
    q = _load(Q + head * D, rows, selected, cols, H * D, D, BLOCK_D, False)
    key = seed_key(SEED) if THRESHOLD > 0 else 0
    hashes = _hashes(TOKENS, first + here, inside, key, head, H, THRESHOLD)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    acc, peak, total = _forward_tiles(
        acc, peak, total, q, base, base + H * D, 0, whole, length, here, hashes, key, scale,
        D, 2 * H * D, BLOCK_D, BLOCK_N, False, THRESHOLD, False, UPCAST_DOT,
    )  # fmt: skip
    acc, peak, total = _forward_tiles(
        acc, peak, total, q, base, base + H * D, whole, length, length, here, hashes, key, scale,
        D, 2 * H * D, BLOCK_D, BLOCK_N, False, THRESHOLD, True, UPCAST_DOT,
    )  # fmt: skip
    _store_rows(OUT + head * D, acc * (keep_scale / total)[:, None], rows, inside, cols, H * D, D)
    tl.store(LSE + head.to(tl.int64) * selected + rows, peak + tl.math.log2(total), mask=inside)


@triton.jit(do_not_specialize=["longest", "selected"])
def selected_backward_queries(
    Q, KV, STARTS, BOUNDS, ORDER, TOKENS, SEED, OUT, LSE, DOUT, DELTA, DQ, longest, selected, scale, keep_scale,
    softmax_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of selected queries of one head; also delta = rowsum(dO * O), which the other kernel reads."""
    blocks = tl.cdiv(longest, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    first, many = _queries(BOUNDS, sequence)
    if block * BLOCK_M >= many:
        return
    start, length = _sequence(STARTS, sequence, longest, False)
    here = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = here < many
    rows = tl.load(ORDER + first + here, mask=inside, other=0)
    cols = tl.arange(0, BLOCK_D)
    base = KV + start * (2 * H * D) + head * D
    q = _load(Q + head * D, rows, selected, cols, H * D, D, BLOCK_D, False)
    do = _load(DOUT + head * D, rows, selected, cols, H * D, D, BLOCK_D, False)
    o = _load(OUT + head * D, rows, selected, cols, H * D, D, BLOCK_D, False)
    slot = head.to(tl.int64) * selected + rows
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(DELTA + slot, delta, mask=inside)
    lse = tl.load(LSE + slot)
    key = seed_key(SEED) if THRESHOLD > 0 else 0
    hashes = _hashes(TOKENS, first + here, inside, key, head, H, THRESHOLD)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    dq = _query_tiles(
        dq, q, do, lse, delta, base, base + H * D, 0, whole, length, here, hashes, key, scale, keep_scale,
        D, 2 * H * D, BLOCK_D, BLOCK_N, False, THRESHOLD, False, UPCAST_DOT,
    )  # fmt: skip
    dq = _query_tiles(
        dq, q, do, lse, delta, base, base + H * D, whole, length, length, here, hashes, key, scale, keep_scale,
        D, 2 * H * D, BLOCK_D, BLOCK_N, False, THRESHOLD, True, UPCAST_DOT,
    )  # fmt: skip
    _store_rows(DQ + head * D, dq * softmax_scale, rows, inside, cols, H * D, D)


@triton.jit(do_not_specialize=["longest", "selected"])
def selected_backward_keys(
    Q, KV, STARTS, BOUNDS, ORDER, TOKENS, SEED, LSE, DOUT, DELTA, DKV, longest, selected, scale, keep_scale,
    softmax_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one head, over the sequence's selected queries; zeros where it has none."""
    blocks = tl.cdiv(longest, BLOCK_N)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    start, length = _sequence(STARTS, sequence, longest, False)
    if block * BLOCK_N >= length:
        return
    first, many = _queries(BOUNDS, sequence)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    base = KV + start * (2 * H * D) + head * D
    k = _load(base, keys, length, cols, 2 * H * D, D, BLOCK_D, True)
    v = _load(base + H * D, keys, length, cols, 2 * H * D, D, BLOCK_D, True)
    key = seed_key(SEED) if THRESHOLD > 0 else 0
    columns = column_hash(key, keys) if THRESHOLD > 0 else keys
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m in tl.range(0, many, BLOCK_M, num_stages=1):
        here = m + tl.arange(0, BLOCK_M)
        inside = here < many
        rows = tl.load(ORDER + first + here, mask=inside, other=0)
        q = _load(Q + head * D, rows, selected, cols, H * D, D, BLOCK_D, False)
        do = _load(DOUT + head * D, rows, selected, cols, H * D, D, BLOCK_D, False)
        slot = head.to(tl.int64) * selected + rows
        lse = tl.where(inside, tl.load(LSE + slot), float("inf"))  # and with it P = 0
        delta = tl.load(DELTA + slot)
        p = tl.math.exp2(_dot(k, tl.trans(q), UPCAST_DOT) * scale - lse[None, :])  # [N, M]
        dp = _dot(v, tl.trans(do), UPCAST_DOT)
        kept = p
        if THRESHOLD > 0:
            hashes = _hashes(TOKENS, first + here, inside, key, head, H, THRESHOLD)
            keep = columns[:, None] * hashes[None, :] >= THRESHOLD
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv += _dot(kept.to(do.dtype), do, UPCAST_DOT)
        dk += _dot((p * (dp - delta[None, :])).to(q.dtype), q, UPCAST_DOT)
    out = DKV + start * (2 * H * D) + head * D
    _store(out, dk * softmax_scale, keys, length, cols, 2 * H * D, D)
    _store(out + H * D, dv * keep_scale, keys, length, cols, 2 * H * D, D)
