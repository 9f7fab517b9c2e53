"""BERT's embedding layer: word, position and segment embedding, their sum's LayerNorm, dropout, in one pass.

    z = word[id] + position[place] + segment[kind]        y = dropout(LayerNorm(z))

The backward pass gathers z again instead of having stored it, gives dz and the norm's gradients in one pass, and
leaves the sums by row of a table to torch's sorted `embedding_dense_backward`. Bytes per token, u = one row: forward
1u in and 1u out, backward 2u in and 1u out, before the tables' gradients.

Devlin et al. 2019, figure 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import triton_op

from ds_stacking.kernels._columns import sum_partials
from ds_stacking.kernels._dropout import column_hash, keep_mask, new_seed, row_hash, seed_key, threshold
from ds_stacking.kernels._launch import Kernel, check, launch, multiprocessors, runs_kernels
from ds_stacking.kernels.add_layer_norm import row_tiles

# T tokens, N hidden size


@triton.jit
def _gathered(
    IDS, PLACES, KINDS, WORD, POSITION, SEGMENT, row, cols, mask, rows, N: tl.constexpr, HAS_SEGMENT: tl.constexpr
):
    """The sum of embeddings, fp32 [ROWS, N], zero outside `mask`."""
    ids = tl.load(IDS + row, mask=row < rows, other=0).to(tl.int64)
    places = tl.load(PLACES + row, mask=row < rows, other=0).to(tl.int64)
    z = tl.load(WORD + ids[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(POSITION + places[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_SEGMENT:
        kinds = tl.load(KINDS + row, mask=row < rows, other=0).to(tl.int64)
        z += tl.load(SEGMENT + kinds[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["rows"])
def _forward(
    WORD, IDS, PLACES, KINDS, POSITION, SEGMENT, WEIGHT, SHIFT, SEED, Y, MEAN, RSTD, rows, eps, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (row[:, None] < rows) & inside[None, :]
    z = _gathered(IDS, PLACES, KINDS, WORD, POSITION, SEGMENT, row, cols, mask, rows, N, HAS_SEGMENT)
    mean = tl.sum(z, axis=1) / N
    centred = tl.where(inside[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + cols, mask=inside, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + shift[None, :]
    if THRESHOLD > 0:
        key = seed_key(SEED)
        keep = row_hash(key, row)[:, None] * column_hash(key, cols)[None, :] >= THRESHOLD
        y = tl.where(keep, y * scale, 0.0)
    tl.store(Y + row[:, None].to(tl.int64) * N + cols[None, :], y, mask=mask)
    tl.store(MEAN + row, mean, mask=row < rows)
    tl.store(RSTD + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "programs"])
def _backward(
    DY, WORD, IDS, PLACES, KINDS, POSITION, SEGMENT, WEIGHT, SEED, MEAN, RSTD, DZ, PARTIALS, rows, programs, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        key = seed_key(SEED)
        column = column_hash(key, cols)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dshift = tl.zeros([BLOCK_N], tl.float32)
    stride = tl.full([], ROWS * N, tl.int64)
    at = tl.arange(0, ROWS)[:, None] * N + cols[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row[:, None] < rows) & inside[None, :]
        start = tile * stride
        dy = tl.load(DY + start + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, N]
        if THRESHOLD > 0:
            dy = tl.where(row_hash(key, row)[:, None] * column[None, :] >= THRESHOLD, dy * scale, 0.0)
        z = _gathered(IDS, PLACES, KINDS, WORD, POSITION, SEGMENT, row, cols, mask, rows, N, HAS_SEGMENT)
        mean = tl.load(MEAN + row, mask=row < rows, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        xhat = (z - mean[:, None]) * rstd[:, None]
        dweight += tl.sum(dy * xhat, axis=0)
        dshift += tl.sum(dy, axis=0)
        g = dy * weight[None, :]
        average = tl.sum(g, axis=1) / N
        projection = tl.sum(g * xhat, axis=1) / N
        dz = rstd[:, None] * (g - average[:, None] - xhat * projection[:, None])
        tl.store(DZ + start + at, dz, mask=mask)
    at_sums = PARTIALS + tl.program_id(0) * 2 * N + cols
    tl.store(at_sums, dweight, mask=inside)
    tl.store(at_sums + N, dshift, mask=inside)


FORWARD = Kernel(fn=_forward, configs=lambda target, meta: row_tiles(target, meta)[:1])
BACKWARD = Kernel(fn=_backward, configs=lambda target, meta: row_tiles(target, meta)[:1])


@triton_op("ds_stacking::embedding_norm", mutates_args=())
def _embedding_norm(
    word: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    ids: torch.Tensor,
    places: torch.Tensor,
    kinds: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [T, N], mean [T] fp32, rstd [T] fp32)."""
    if not runs_kernels(word):
        return _forward_reference(word, position, segment, weight, shift, ids, places, kinds, seed, p, eps)
    rows, width = ids.numel(), word.shape[1]
    y = torch.empty(rows, width, dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=word.device) for _ in range(2))
    launch(
        FORWARD, lambda meta: (triton.cdiv(rows, meta["ROWS"]),), word, ids, places, ids if kinds is None else kinds,
        position, word if segment is None else segment, weight, shift, ids if seed is None else seed, y, mean, rstd,
        rows, eps, 1 / (1 - p), N=width, BLOCK_N=triton.next_power_of_2(width), HAS_SEGMENT=segment is not None,
        THRESHOLD=threshold(p),
    )  # fmt: skip
    return y, mean, rstd


@triton_op("ds_stacking::embedding_norm_backward", mutates_args=())
def _embedding_norm_backward(
    dy: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor | None,
    weight: torch.Tensor,
    ids: torch.Tensor,
    places: torch.Tensor,
    kinds: torch.Tensor | None,
    seed: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dz [T, N], [dweight, dshift] as one tensor [2, N])."""
    if not runs_kernels(word):
        return _backward_reference(dy, word, position, segment, weight, ids, places, kinds, seed, mean, rstd, p)
    rows, width = dy.shape
    dz = torch.empty_like(dy)
    programs = min(triton.cdiv(rows, 8), 4 * multiprocessors(dy.device))
    partials = torch.empty(programs, 2, width, dtype=torch.float32, device=dy.device)
    launch(
        BACKWARD, (programs,), dy, word, ids, places, ids if kinds is None else kinds, position,
        word if segment is None else segment, weight, ids if seed is None else seed, mean, rstd, dz, partials, rows,
        programs, 1 / (1 - p), N=width, BLOCK_N=triton.next_power_of_2(width), HAS_SEGMENT=segment is not None,
        THRESHOLD=threshold(p),
    )  # fmt: skip
    return dz, sum_partials(partials, weight.dtype)


def _sum(word, position, segment, ids, places, kinds):
    z = F.embedding(ids, word) + F.embedding(places, position).to(torch.promote_types(word.dtype, torch.float32))
    return z if segment is None else z + F.embedding(kinds, segment)


def _keep(x, seed, p):
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return keep_mask(seed, rows[:, None], columns, p)


def _forward_reference(word, position, segment, weight, shift, ids, places, kinds, seed, p, eps):
    z = _sum(word, position, segment, ids, places, kinds)
    mean, rstd = z.mean(1), (z.var(1, unbiased=False) + eps).rsqrt()
    y = (z - mean[:, None]) * rstd[:, None] * weight + shift
    if p > 0:
        y = torch.where(_keep(y, seed, p), y / (1 - p), 0.0)
    return y.to(word.dtype), mean, rstd


def _backward_reference(dy, word, position, segment, weight, ids, places, kinds, seed, mean, rstd, p):
    xhat = (_sum(word, position, segment, ids, places, kinds) - mean[:, None]) * rstd[:, None]
    if p > 0:
        dy = torch.where(_keep(dy, seed, p), dy / (1 - p), 0.0)
    g = dy * weight
    dz = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    return dz.to(word.dtype), torch.stack([(dy * xhat).sum(0), dy.sum(0, dtype=xhat.dtype)]).to(weight.dtype)


def _save(ctx, inputs, output):
    word, position, segment, weight, _, ids, places, kinds, seed, ctx.p, _ = inputs
    ctx.save_for_backward(word, position, segment, weight, ids, places, kinds, seed, *output[1:])


def _differentiate(ctx, dy, dmean, drstd):
    dz, sums = _embedding_norm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.p)
    word, position, segment, _, ids, places, kinds = ctx.saved_tensors[:7]
    tables = [
        None if table is None else torch.ops.aten.embedding_dense_backward(dz, index, len(table), -1, False)
        for table, index in ((word, ids), (position, places), (segment, kinds))
    ]
    return *tables, sums[0], sums[1], None, None, None, None, None, None


_embedding_norm.register_autograd(_differentiate, setup_context=_save)


def embedding_norm(
    ids: torch.Tensor,
    places: torch.Tensor,
    kinds: torch.Tensor | None,
    *,
    word: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor | None = None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """dropout(LayerNorm(word[ids] + position[places] + segment[kinds])).

    Args:
        ids, places, kinds: int64 [T], rows of the three tables; kinds is None exactly where segment is.
        word, position, segment: [rows, N], contiguous; bf16, fp16 or fp32.
        weight, shift: [N], the norm's gain and bias.
        dropout, seed, eps: as for `add_layer_norm`.

    Returns:
        [T, N] in word's dtype.

    Raises:
        ValueError: shapes, dtypes or rate do not fit.
    """
    check((kinds is None) == (segment is None), "segment and kinds belong together; give both or neither.")
    for name, table in (("word", word), ("position", position), ("segment", segment)):
        check(
            table is None
            or (table.shape[1:] == word.shape[1:] and table.is_contiguous() and table.dtype == word.dtype),
            f"{name} must be a contiguous {word.dtype} table of {word.shape[1]} columns, like word.",
        )
    for name, index in (("ids", ids), ("places", places), ("kinds", kinds)):
        check(
            index is None or (index.shape == ids.shape and index.dim() == 1 and index.dtype == torch.int64),
            f"{name} is {index.dtype if index is not None else ''} of shape "
            f"{tuple(index.shape) if index is not None else ()}; it must be torch.int64 {list(ids.shape)}.",
        )
    for name, vector in (("weight", weight), ("shift", shift)):
        check(vector.shape == word.shape[1:], f"{name} has shape {tuple(vector.shape)}; word needs [{word.shape[1]}].")
    check(0 <= dropout < 1, f"dropout is {dropout}; it must lie in [0, 1).")
    if dropout > 0 and seed is None:
        seed = new_seed(word.device)
    seed = seed if dropout > 0 else None
    return _embedding_norm(word, position, segment, weight, shift, ids, places, kinds, seed, dropout, eps)[0]
