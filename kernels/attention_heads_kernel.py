"""Triton kernel of attention's backward pass that differentiates whole heads with five products.

A program takes one head of one sequence after another. Its dQ is summed over the tiles of keys in fp32, in scratch of
the program's own that stays in the L2 cache: 256 bytes per token, 128 kB at 512 tokens. Additions are `red`
instructions, which do not wait for their result as loads would. They are deterministic: no other program touches the
scratch, each element is added to once per tile of keys, and barriers put the tiles in order.

What the inner loop needs of every row lies beside it in the scratch, four numbers to a row: -lse, -delta and the
dropout hash. Loaded as one tile they reach shared memory by one 16-byte copy per row; three vectors in the layout of
the scores' columns would be copied 4 bytes at a time, once per warp.

Legend: S longest sequence, D head size, M queries and N keys of a tile, P programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_stacking.kernels._dropout import column_hash, row_hash, seed_key
from ds_stacking.kernels.attention_kernels import _dot, _load, _sequence, _store


@triton.jit
def _prepare(
    DOUT, OUT, LSE, DQ, ROWS, length, limit, key, first, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Zero the scratch of dQ; write -lse, -delta / keep_scale and the hash of every row; padding gets P = 0."""
    cols = tl.arange(0, BLOCK_D)
    for m in tl.range(0, limit, BLOCK_M, num_stages=1):
        rows = m + tl.arange(0, BLOCK_M)
        do = _load(DOUT, rows, length, cols, H * D, D, BLOCK_D, True)
        o = _load(OUT, rows, length, cols, H * D, D, BLOCK_D, True)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1) / keep_scale
        lse = tl.load(LSE + rows, mask=rows < length, other=float("inf"))
        tl.store(ROWS + rows * 4, -lse)
        tl.store(ROWS + rows * 4 + 1, -delta)
        if THRESHOLD > 0:
            tl.store(ROWS + rows * 4 + 2, row_hash(key, first + rows * H).to(tl.float32, bitcast=True))
        tl.store(DQ + rows[:, None] * BLOCK_D + cols[None, :], tl.zeros([BLOCK_M, BLOCK_D], tl.float32))


@triton.jit
def _tiles(
    dk, dv, k, v, Q, DO, DQ, ROWS, begin, end, length, keys, columns, scale,
    D: tl.constexpr, H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, MASKED: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Tiles of queries [begin, end) with one of keys, transposed, so that P^T and dS^T enter products from registers.

    MASKED tiles may reach beyond the last key or the diagonal.
    """
    cols = tl.arange(0, BLOCK_D)
    for m in tl.range(begin, end, BLOCK_M, num_stages=1 if MASKED else None):
        m = tl.multiple_of(m, BLOCK_M)
        rows = m + tl.arange(0, BLOCK_M)
        inside = tl.minimum(rows, length - 1)  # in place of a mask: rows beyond the sequence have P = 0
        q = _load(Q, inside, length, cols, 3 * H * D, D, BLOCK_D, False)
        do = _load(DO, inside, length, cols, H * D, D, BLOCK_D, False)
        fours = tl.load(ROWS + m * 4 + tl.arange(0, 4 * BLOCK_M))
        pairs, rest = tl.split(tl.reshape(fours, [BLOCK_M, 2, 2]))  # elements 0 and 2, elements 1 and 3
        lse, bits = tl.split(pairs)
        delta, _ = tl.split(rest)
        scores = _dot(k, tl.trans(q), UPCAST_DOT)  # [N, M]
        p = tl.math.exp2(scores * scale + lse[None, :])
        if MASKED:
            visible = keys[:, None] < length
            if CAUSAL:
                visible = visible & (keys[:, None] <= rows[None, :])
            p = tl.where(visible, p, 0.0)
        dp = _dot(v, tl.trans(do), UPCAST_DOT)  # [N, M]
        kept = p
        if THRESHOLD > 0:
            hashes = bits.to(tl.uint32, bitcast=True)
            # factors, not selections: dp's becomes part of a multiply-add
            keep = tl.where(columns[:, None] * hashes[None, :] >= THRESHOLD, 1.0, 0.0)
            kept = p * keep
            dp = dp * keep
        dv += _dot(kept.to(do.dtype), do, UPCAST_DOT)
        ds = (p * (dp + delta[None, :])).to(q.dtype)
        dk += _dot(ds, q, UPCAST_DOT)
        dq = _dot(tl.trans(k), ds, UPCAST_DOT)  # [D, M]
        slot = DQ + m * BLOCK_D + cols[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.atomic_add(slot, dq, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["longest", "heads", "programs"])
def backward_heads(
    QKV, STARTS, SEED, OUT, LSE, DOUT, SCRATCH, DQKV, PARTIALS, longest, tokens, heads, programs, room, scale,
    keep_scale, softmax_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of whole heads. SCRATCH is fp32 [P, room * (BLOCK_D + 4)], room at least S and whole tiles of M.

    Products get dS without keep_scale and softmax_scale, which multiply the results. With HAS_BIAS their column sums
    before rounding go to the sequence's row of PARTIALS, fp32 [B, 3, H, D].
    """
    cols = tl.arange(0, BLOCK_D)
    key = seed_key(SEED) if THRESHOLD > 0 else 0
    DQ = SCRATCH + tl.program_id(0).to(tl.int64) * (room * (BLOCK_D + 4))
    ROWS = DQ + room * BLOCK_D
    for index in range(tl.program_id(0), heads, programs):
        one = tl.full([], index, tl.int32)
        head = one % H
        start, length = _sequence(STARTS, one // H, longest, PADDED)
        limit = longest if PADDED else length  # padded rows are written: zeros
        base = QKV + start * (3 * H * D) + head * D
        do = DOUT + start * (H * D) + head * D
        out = DQKV + start * (3 * H * D) + head * D
        sums = PARTIALS + (one // H).to(tl.int64) * (3 * H * D) + head * D + cols
        tl.debug_barrier()  # the head before has been read from the scratch
        if HAS_BIAS:
            tl.store(sums + H * D, tl.zeros([BLOCK_D], tl.float32), mask=cols < D)
            tl.store(sums + 2 * H * D, tl.zeros([BLOCK_D], tl.float32), mask=cols < D)
        _prepare(
            do, OUT + start * (H * D) + head * D, LSE + head.to(tl.int64) * tokens + start, DQ, ROWS, length, limit,
            key, start * H + head, keep_scale, H, D, BLOCK_D, THRESHOLD, BLOCK_M,
        )  # fmt: skip
        tl.debug_barrier()  # what one thread wrote there another reads or adds to
        for n in tl.range(0, limit, BLOCK_N, num_stages=1):
            keys = n + tl.arange(0, BLOCK_N)
            k = _load(base + H * D, keys, length, cols, 3 * H * D, D, BLOCK_D, True)
            v = _load(base + 2 * H * D, keys, length, cols, 3 * H * D, D, BLOCK_D, True)
            columns = column_hash(key, keys) if THRESHOLD > 0 else keys
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            tl.static_assert(not CAUSAL or BLOCK_N % BLOCK_M == 0, "tiles of queries end where those of keys do")
            begin = n if CAUSAL else 0
            whole = n + BLOCK_N if CAUSAL else 0
            if n + BLOCK_N > length:
                whole = length
            dk, dv = _tiles(
                dk, dv, k, v, base, do, DQ, ROWS, begin, whole, length, keys, columns, scale,
                D, H, BLOCK_D, BLOCK_M, CAUSAL, THRESHOLD, True, UPCAST_DOT,
            )  # fmt: skip
            dk, dv = _tiles(
                dk, dv, k, v, base, do, DQ, ROWS, whole, length, length, keys, columns, scale,
                D, H, BLOCK_D, BLOCK_M, CAUSAL, THRESHOLD, False, UPCAST_DOT,
            )  # fmt: skip
            valid = keys[:, None] < length
            dk = tl.where(valid, dk * (softmax_scale * keep_scale), 0.0)
            _store(out + H * D, dk, keys, limit, cols, 3 * H * D, D)
            if HAS_BIAS:  # in the order of tiles, as for dQ
                tl.atomic_add(sums + H * D, tl.sum(dk, axis=0), mask=cols < D, sem="relaxed")
            dv = tl.where(valid, dv * keep_scale, 0.0)
            _store(out + 2 * H * D, dv, keys, limit, cols, 3 * H * D, D)
            if HAS_BIAS:
                tl.atomic_add(sums + 2 * H * D, tl.sum(dv, axis=0), mask=cols < D, sem="relaxed")
            tl.debug_barrier()  # the next tile of keys adds to the same elements, later
        total = tl.zeros([BLOCK_D], tl.float32)
        for m in tl.range(0, limit, BLOCK_M, num_stages=1):
            rows = m + tl.arange(0, BLOCK_M)
            slot = DQ + m * BLOCK_D + cols[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            dq = tl.trans(tl.load(slot, cache_modifier=".cg"))  # additions bypass the L1 cache, and so does this
            dq = dq * (softmax_scale * keep_scale)
            _store(out, dq, rows, limit, cols, 3 * H * D, D)
            if HAS_BIAS:
                total += tl.sum(dq, axis=0)
        if HAS_BIAS:
            tl.store(sums, total, mask=cols < D)
