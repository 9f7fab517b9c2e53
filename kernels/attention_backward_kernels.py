"""Triton kernels of attention's backward pass: in two kernels, and in one for short sequences.

Legend: S longest sequence, D head size, M queries and N keys of a tile. `lse` is the row's log2-sum-exp2 of scaled
scores, so that P = exp2(scores * scale - lse). One program writes each element, without atomics: deterministic.

With HAS_BIAS they leave in PARTIALS, fp32 [rows, 3, H, D], column sums of dQ, dK and dV before rounding: whole heads a
row per sequence, tiles a row per 32 tokens, which are few bytes beside those of another pass over dQKV.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_stacking.kernels._dropout import column_hash, row_hash, seed_key
from ds_stacking.kernels.attention_kernels import _dot, _load, _sequence, _store


@triton.jit
def _probabilities(
    scores, lse, rows, keys, length, scale, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P from raw scores; `rows`, `keys` and `lse` are broadcast to the scores' shape."""
    p = tl.math.exp2(scores * scale - lse)
    if MASKED:
        visible = keys < length
        if CAUSAL:
            visible = visible & (keys <= rows)
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _store_sums(
    PARTIALS, values, kind, begin, limit, sequence, start, head, cols,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over every 32 rows of a tile, `values` [BLOCK, BLOCK_D], which begins at row `begin` of its sequence.

    They go to row b + t // 32 of PARTIALS, for sequence b and first token t of the 32: no two go to the same, whatever
    the tiles, and the few rows in between stay as they are.
    """
    tl.static_assert(BLOCK % 32 == 0, "a tile holds whole groups of 32 rows")
    sums = tl.sum(tl.reshape(values, [BLOCK // 32, 32, BLOCK_D]), axis=1)
    group = tl.arange(0, BLOCK // 32)
    at = ((sequence + (start + begin) // 32 + group[:, None]) * 3 + kind) * (H * D) + head * D + cols[None, :]
    tl.store(PARTIALS + at, sums, mask=(begin + group[:, None] * 32 < limit) & (cols[None, :] < D))


@triton.jit
def _query_tiles(
    dq, q, do, lse, delta, K, V, begin, end, length, rows, hashes, key, scale, keep_scale,
    D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, MASKED: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    for n in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED else None):
        keys = n + tl.arange(0, BLOCK_N)
        k = _load(K, keys, length, cols, STRIDE, D, BLOCK_D, MASKED)
        v = _load(V, keys, length, cols, STRIDE, D, BLOCK_D, MASKED)
        scores = _dot(q, tl.trans(k), UPCAST_DOT)  # [M, N]
        p = _probabilities(scores, lse[:, None], rows[:, None], keys[None, :], length, scale, CAUSAL, MASKED)
        dp = _dot(do, tl.trans(v), UPCAST_DOT)  # [M, N]
        if THRESHOLD > 0:
            dp = tl.where(hashes[:, None] * column_hash(key, keys)[None, :] >= THRESHOLD, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq += _dot(ds.to(k.dtype), k, UPCAST_DOT)
    return dq


@triton.jit(do_not_specialize=["longest"])
def backward_queries(
    QKV, STARTS, SEED, OUT, LSE, DOUT, DELTA, DQKV, PARTIALS, longest, tokens, scale, keep_scale, softmax_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head; also delta = rowsum(dO * O), which the other kernel reads."""
    blocks = tl.cdiv(longest, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    start, length = _sequence(STARTS, sequence, longest, PADDED)
    limit = longest if PADDED else length
    if block * BLOCK_M >= limit:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    base = QKV + start * (3 * H * D) + head * D
    slot = head.to(tl.int64) * tokens + start + rows
    q = _load(base, rows, length, cols, 3 * H * D, D, BLOCK_D, True)
    do = _load(DOUT + start * (H * D) + head * D, rows, length, cols, H * D, D, BLOCK_D, True)
    o = _load(OUT + start * (H * D) + head * D, rows, length, cols, H * D, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(DELTA + slot, delta, mask=rows < length)
    lse = tl.load(LSE + slot, mask=rows < length, other=float("inf"))
    hashes = rows.to(tl.uint32)
    key = hashes
    if THRESHOLD > 0:
        key = seed_key(SEED)
        hashes = row_hash(key, (start + rows) * H + head)
    end = tl.minimum(length, (block + 1) * BLOCK_M) if CAUSAL else length
    whole = (tl.minimum(length, block * BLOCK_M) if CAUSAL else length) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _query_tiles(
        dq, q, do, lse, delta, base + H * D, base + 2 * H * D, 0, whole, length, rows, hashes, key, scale,
        keep_scale, D, 3 * H * D, BLOCK_D, BLOCK_N, CAUSAL, THRESHOLD, False, UPCAST_DOT,
    )  # fmt: skip
    dq = _query_tiles(
        dq, q, do, lse, delta, base + H * D, base + 2 * H * D, whole, end, length, rows, hashes, key, scale,
        keep_scale, D, 3 * H * D, BLOCK_D, BLOCK_N, CAUSAL, THRESHOLD, True, UPCAST_DOT,
    )  # fmt: skip
    dq = dq * softmax_scale
    _store(DQKV + start * (3 * H * D) + head * D, dq, rows, limit, cols, 3 * H * D, D)
    if HAS_BIAS:
        _store_sums(PARTIALS, dq, 0, block * BLOCK_M, limit, sequence, start, head, cols, H, D, BLOCK_D, BLOCK_M)


@triton.jit
def _key_tiles(
    dk, dv, k, v, Q, DO, LSE, DELTA, begin, end, length, keys, start, head, key, scale, keep_scale,
    D: tl.constexpr, H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, THRESHOLD: tl.constexpr,
    DIAGONAL: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """In transposed form, so that P^T and dS^T enter their products from registers."""
    cols = tl.arange(0, BLOCK_D)
    for m in tl.range(begin, end, BLOCK_M, num_stages=1 if DIAGONAL else None):
        rows = m + tl.arange(0, BLOCK_M)
        q = _load(Q, rows, length, cols, 3 * H * D, D, BLOCK_D, True)
        do = _load(DO, rows, length, cols, H * D, D, BLOCK_D, True)
        # rows beyond the sequence get lse = inf and with it P = 0
        lse = tl.load(LSE + rows, mask=rows < length, other=float("inf"))
        delta = tl.load(DELTA + rows, mask=rows < length, other=0.0)
        scores = _dot(k, tl.trans(q), UPCAST_DOT)  # [N, M]
        p = tl.math.exp2(scores * scale - lse[None, :])
        if DIAGONAL:
            p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        dp = _dot(v, tl.trans(do), UPCAST_DOT)  # [N, M]
        if THRESHOLD > 0:
            hashes = row_hash(key, (start + rows) * H + head)
            keep = column_hash(key, keys)[:, None] * hashes[None, :] >= THRESHOLD
            dp = tl.where(keep, dp * keep_scale, 0.0)
            dv += _dot(tl.where(keep, p, 0.0).to(do.dtype), do, UPCAST_DOT)
        else:
            dv += _dot(p.to(do.dtype), do, UPCAST_DOT)
        ds = p * (dp - delta[None, :])
        dk += _dot(ds.to(q.dtype), q, UPCAST_DOT)
    return dk, dv


@triton.jit(do_not_specialize=["longest"])
def backward_keys(
    QKV, STARTS, SEED, LSE, DOUT, DELTA, DQKV, PARTIALS, longest, tokens, scale, keep_scale, softmax_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one head."""
    blocks = tl.cdiv(longest, BLOCK_N)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // blocks // H
    start, length = _sequence(STARTS, sequence, longest, PADDED)
    limit = longest if PADDED else length
    if block * BLOCK_N >= limit:
        return
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    base = QKV + start * (3 * H * D) + head * D
    do = DOUT + start * (H * D) + head * D
    slot = head.to(tl.int64) * tokens + start
    k = _load(base + H * D, keys, length, cols, 3 * H * D, D, BLOCK_D, True)
    v = _load(base + 2 * H * D, keys, length, cols, 3 * H * D, D, BLOCK_D, True)
    key = seed_key(SEED) if THRESHOLD > 0 else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL:
        tl.static_assert(BLOCK_N % BLOCK_M == 0, "tiles of queries must end where the tile of keys ends")
        begin = block * BLOCK_N
        diagonal = tl.minimum(length, begin + BLOCK_N)
        dk, dv = _key_tiles(
            dk, dv, k, v, base, do, LSE + slot, DELTA + slot, begin, diagonal, length, keys, start, head, key, scale,
            keep_scale, D, H, BLOCK_D, BLOCK_M, THRESHOLD, True, UPCAST_DOT,
        )  # fmt: skip
        begin += BLOCK_N
    dk, dv = _key_tiles(
        dk, dv, k, v, base, do, LSE + slot, DELTA + slot, begin, length, length, keys, start, head, key, scale,
        keep_scale, D, H, BLOCK_D, BLOCK_M, THRESHOLD, False, UPCAST_DOT,
    )  # fmt: skip
    valid = keys[:, None] < length
    out = DQKV + start * (3 * H * D) + head * D
    dk = tl.where(valid, dk * softmax_scale, 0.0)
    dv = tl.where(valid, dv * keep_scale, 0.0)
    _store(out + H * D, dk, keys, limit, cols, 3 * H * D, D)
    _store(out + 2 * H * D, dv, keys, limit, cols, 3 * H * D, D)
    if HAS_BIAS:
        _store_sums(PARTIALS, dk, 1, block * BLOCK_N, limit, sequence, start, head, cols, H, D, BLOCK_D, BLOCK_N)
        _store_sums(PARTIALS, dv, 2, block * BLOCK_N, limit, sequence, start, head, cols, H, D, BLOCK_D, BLOCK_N)


@triton.jit(do_not_specialize=["longest", "heads", "programs"])
def backward_short(
    QKV, STARTS, SEED, LSE, DOUT, DQKV, PARTIALS, longest, tokens, heads, programs, scale, keep_scale, softmax_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of whole heads of sequences up to BLOCK tokens: five products, every input read once.

    Each program walks heads with a stride, and STAGES of their loads are in flight at once. delta is the row sum of
    P * dP, so O is not read.
    """
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    for index in tl.range(tl.program_id(0), heads, programs, num_stages=STAGES):
        one = tl.full([], index, tl.int32)
        head = one % H
        start, length = _sequence(STARTS, one // H, longest, PADDED)
        limit = longest if PADDED else length
        base = QKV + start * (3 * H * D) + head * D
        q = _load(base, rows, length, cols, 3 * H * D, D, BLOCK_D, True)
        k = _load(base + H * D, rows, length, cols, 3 * H * D, D, BLOCK_D, True)
        v = _load(base + 2 * H * D, rows, length, cols, 3 * H * D, D, BLOCK_D, True)
        do = _load(DOUT + start * (H * D) + head * D, rows, length, cols, H * D, D, BLOCK_D, True)
        slot = head.to(tl.int64) * tokens + start
        lse = tl.load(LSE + slot + rows, mask=rows < length, other=float("inf"))
        scores = _dot(q, tl.trans(k), UPCAST_DOT)  # [M, N]
        p = _probabilities(scores, lse[:, None], rows[:, None], rows[None, :], length, scale, CAUSAL, True)
        dp = _dot(do, tl.trans(v), UPCAST_DOT)  # [M, N]
        kept = p
        if THRESHOLD > 0:
            key = seed_key(SEED)
            hashes = row_hash(key, (start + rows) * H + head)
            keep = hashes[:, None] * column_hash(key, rows)[None, :] >= THRESHOLD
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0)
        out = DQKV + start * (3 * H * D) + head * D
        sums = PARTIALS + (one // H).to(tl.int64) * (3 * H * D) + head * D + cols
        # each product is stored and summed before the next one: registers are short
        dv = _dot(tl.trans(kept.to(do.dtype)), do, UPCAST_DOT) * keep_scale
        _store(out + 2 * H * D, dv, rows, limit, cols, 3 * H * D, D)
        if HAS_BIAS:
            tl.store(sums + 2 * H * D, tl.sum(dv, axis=0), mask=cols < D)
        delta = tl.sum(p * dp, axis=1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = _dot(tl.trans(ds), q, UPCAST_DOT) * (softmax_scale * keep_scale)
        _store(out + H * D, dk, rows, limit, cols, 3 * H * D, D)
        if HAS_BIAS:
            tl.store(sums + H * D, tl.sum(dk, axis=0), mask=cols < D)
        dq = _dot(ds, k, UPCAST_DOT) * (softmax_scale * keep_scale)
        _store(out, dq, rows, limit, cols, 3 * H * D, D)
        if HAS_BIAS:
            tl.store(sums, tl.sum(dq, axis=0), mask=cols < D)
