"""BERT's embedding layer: word, position and segment embedding, their sum's LayerNorm, dropout, in one pass.

    z = word[id] + position[place] + segment[kind]        y = dropout(LayerNorm(z))

The backward pass gathers z again instead of having stored it, gives dz and the norm's gradients in one pass, and
leaves the words' sums by row to torch's sorted `embedding_dense_backward`, those of small tables to small_tables.py.
Where no token has a kind all are of kind 0, whose gradient is one column sum more. Bytes per token, u = one row:
forward 1u in and 1u out, backward 2u in (3u with a second dy) and 1u out, before the tables' gradients.

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
from ds_stacking.kernels._launch import Kernel, check, launch, runs_kernels
from ds_stacking.kernels._readers import read_twice, second_reader
from ds_stacking.kernels.add_layer_norm import BACKWARD_WARPS, resident_rows, row_tiles, tile_rows
from ds_stacking.kernels.small_tables import table_gradient

# T tokens, N hidden size


@triton.jit
def _gathered(
    IDS, PLACES, KINDS, WORD, POSITION, SEGMENT, row, cols, mask, rows, period, N: tl.constexpr,
    HAS_SEGMENT: tl.constexpr, HAS_KINDS: tl.constexpr,
):  # fmt: skip
    """The sum of embeddings, fp32 [ROWS, N], zero outside `mask`."""
    ids = tl.load(IDS + row, mask=row < rows, other=0).to(tl.int64)
    places = tl.load(PLACES + row % period, mask=row < rows, other=0).to(tl.int64)
    z = tl.load(WORD + ids[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(POSITION + places[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_KINDS:
        kinds = tl.load(KINDS + row, mask=row < rows, other=0).to(tl.int64)
        z += tl.load(SEGMENT + kinds[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    elif HAS_SEGMENT:
        z += tl.load(SEGMENT + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["rows", "period"])
def _forward(
    WORD, IDS, PLACES, KINDS, POSITION, SEGMENT, WEIGHT, SHIFT, SEED, Y, MEAN, RSTD, rows, period, eps, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    HAS_KINDS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (row[:, None] < rows) & inside[None, :]
    z = _gathered(
        IDS, PLACES, KINDS, WORD, POSITION, SEGMENT, row, cols, mask, rows, period, N, HAS_SEGMENT, HAS_KINDS
    )
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


@triton.jit(do_not_specialize=["rows", "period", "programs"])
def _backward(
    DY, DY2, WORD, IDS, PLACES, KINDS, POSITION, SEGMENT, WEIGHT, SEED, MEAN, RSTD, DZ, PARTIALS, rows, period,
    programs, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SECOND: tl.constexpr,
    HAS_SEGMENT: tl.constexpr, HAS_KINDS: tl.constexpr, SUMS: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    weight = tl.load(WEIGHT + cols, mask=inside, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        key = seed_key(SEED)
        column = column_hash(key, cols)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dshift = tl.zeros([BLOCK_N], tl.float32)
    dfirst = tl.zeros([BLOCK_N], tl.float32)  # of the first kind, where it is everyone's
    stride = tl.full([], ROWS * N, tl.int64)
    at = tl.arange(0, ROWS)[:, None] * N + cols[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row[:, None] < rows) & inside[None, :]
        start = tile * stride
        dy = tl.load(DY + start + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, N]
        if HAS_SECOND:
            dy += tl.load(DY2 + start + at, mask=mask, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            dy = tl.where(row_hash(key, row)[:, None] * column[None, :] >= THRESHOLD, dy * scale, 0.0)
        z = _gathered(
            IDS, PLACES, KINDS, WORD, POSITION, SEGMENT, row, cols, mask, rows, period, N, HAS_SEGMENT, HAS_KINDS
        )
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
        if SUMS == 3:
            dfirst += tl.sum(tl.where(mask, dz, 0.0), axis=0)
    at_sums = PARTIALS + tl.program_id(0) * SUMS * N + cols
    tl.store(at_sums, dweight, mask=inside)
    tl.store(at_sums + N, dshift, mask=inside)
    if SUMS == 3:
        tl.store(at_sums + 2 * N, dfirst, mask=inside)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [T, N], mean [T] fp32, rstd [T] fp32, what `read_twice` needs [T, N])."""
    if not runs_kernels(word):
        return _forward_reference(word, position, segment, weight, shift, ids, places, kinds, seed, p, eps)
    rows, width = ids.numel(), word.shape[1]
    y = torch.empty(rows, width, dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=word.device) for _ in range(2))
    launch(
        FORWARD, lambda meta: (triton.cdiv(rows, meta["ROWS"]),), word, ids, places, ids if kinds is None else kinds,
        position, word if segment is None else segment, weight, shift, ids if seed is None else seed, y, mean, rstd,
        rows, len(places), eps, 1 / (1 - p), N=width, BLOCK_N=triton.next_power_of_2(width),
        HAS_SEGMENT=segment is not None, HAS_KINDS=kinds is not None, THRESHOLD=threshold(p),
    )  # fmt: skip
    return y, mean, rstd, second_reader(y)


@triton_op("ds_stacking::embedding_norm_backward", mutates_args=())
def _embedding_norm_backward(
    dy: torch.Tensor,
    dy2: torch.Tensor | None,
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
    """(dz [T, N], [dweight, dshift(, the first kind's gradient)] as one tensor [2 or 3, N])."""
    if not runs_kernels(word):
        return _backward_reference(dy, dy2, word, position, segment, weight, ids, places, kinds, seed, mean, rstd, p)
    rows, width = dy.shape
    dz = torch.empty_like(dy)
    block = triton.next_power_of_2(width)
    programs = triton.cdiv(min(rows, resident_rows(block, BACKWARD_WARPS, dy.device)), tile_rows(block))
    sums = 3 if segment is not None and kinds is None else 2
    partials = torch.empty(programs, sums, width, dtype=torch.float32, device=dy.device)
    launch(
        BACKWARD, (programs,), dy, dy if dy2 is None else dy2, word, ids, places, ids if kinds is None else kinds,
        position, word if segment is None else segment, weight, ids if seed is None else seed, mean, rstd, dz,
        partials, rows, len(places), programs, 1 / (1 - p), N=width, BLOCK_N=block,
        HAS_SECOND=dy2 is not None, HAS_SEGMENT=segment is not None, HAS_KINDS=kinds is not None, SUMS=sums,
        THRESHOLD=threshold(p),
    )  # fmt: skip
    return dz, sum_partials(partials, weight.dtype)


def _sum(word, position, segment, ids, places, kinds):
    place = F.embedding(places.repeat(len(ids) // max(1, len(places))), position)
    z = F.embedding(ids, word) + place.to(torch.promote_types(word.dtype, torch.float32))
    if segment is None:
        return z
    return z + (segment[0] if kinds is None else F.embedding(kinds, segment))


def _keep(x, seed, p):
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return keep_mask(seed, rows[:, None], columns, p)


def _forward_reference(word, position, segment, weight, shift, ids, places, kinds, seed, p, eps):
    z = _sum(word, position, segment, ids, places, kinds)
    mean, rstd = z.mean(1), (z.var(1, unbiased=False) + eps).rsqrt()
    y = (z - mean[:, None]) * rstd[:, None] * weight + shift
    if p > 0:
        y = torch.where(_keep(y, seed, p), y / (1 - p), 0.0)
    y = y.to(word.dtype)
    return y, mean, rstd, second_reader(y)


def _backward_reference(dy, dy2, word, position, segment, weight, ids, places, kinds, seed, mean, rstd, p):
    xhat = (_sum(word, position, segment, ids, places, kinds) - mean[:, None]) * rstd[:, None]
    dy = dy if dy2 is None else dy.to(xhat.dtype) + dy2
    if p > 0:
        dy = torch.where(_keep(dy, seed, p), dy / (1 - p), 0.0)
    g = dy * weight
    dz = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    first = [dz.sum(0)] if segment is not None and kinds is None else []
    sums = [(dy * xhat).sum(0), dy.sum(0, dtype=xhat.dtype), *first]
    return dz.to(word.dtype), torch.stack(sums).to(weight.dtype)


def _save(ctx, inputs, output):
    word, position, segment, weight, _, ids, places, kinds, seed, ctx.p, _ = inputs
    ctx.save_for_backward(word, position, segment, weight, ids, places, kinds, seed, *output[1:3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dmean, drstd, dy2):
    dz, sums = _embedding_norm_backward(
        dy.contiguous(), None if dy2 is None else dy2.contiguous(), *ctx.saved_tensors, ctx.p
    )
    word, position, segment, _, ids, places, kinds = ctx.saved_tensors[:7]
    dword = torch.ops.aten.embedding_dense_backward(dz, ids, len(word), -1, False)
    dposition, dsegment = table_gradient(dz, places, len(position)), None
    if segment is not None:
        # of the first kind alone, or by kinds
        dsegment = (
            F.pad(sums[2:], (0, 0, 0, len(segment) - 1)) if kinds is None else table_gradient(dz, kinds, len(segment))
        )
    return dword, dposition, dsegment, sums[0], sums[1], None, None, None, None, None, None


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
    twice: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """dropout(LayerNorm(word[ids] + position[places] + segment[kinds])).

    Args:
        ids: int64 [T], rows of word.
        places: int64 [P], rows of position; T is a multiple of P, and every P tokens have the same places.
        kinds: int64 [T], rows of segment; None: the first row is everyone's.
        word, position, segment: [rows, N], contiguous; bf16, fp16 or fp32.
        weight, shift: [N], the norm's gain and bias.
        dropout, seed, eps, twice: as for `add_layer_norm`.

    Returns:
        y [T, N] in word's dtype, or (y, y).

    Raises:
        ValueError: shapes, dtypes or rate do not fit.
    """
    check(kinds is None or segment is not None, "kinds are rows of segment, which is missing; give it.")
    for name, table in (("word", word), ("position", position), ("segment", segment)):
        check(
            table is None
            or (table.shape[1:] == word.shape[1:] and table.is_contiguous() and table.dtype == word.dtype),
            lambda: f"{name} must be a contiguous {word.dtype} table of {word.shape[1]} columns, like word.",
        )
    for name, index in (("ids", ids), ("places", places), ("kinds", kinds)):
        check(
            index is None
            or (index.dim() == 1 and index.dtype == torch.int64 and (name == "places" or index.shape == ids.shape)),
            lambda: (
                f"{name} is {index.dtype if index is not None else ''} of shape "
                f"{tuple(index.shape) if index is not None else ()}; it must be torch.int64 {list(ids.shape)}."
            ),
        )
    check(
        len(ids) == len(places) or (len(places) and len(ids) % len(places) == 0),
        lambda: (
            f"places has {len(places)} entries for {len(ids)} tokens; it must be as long, or its length divide theirs."
        ),
    )
    for name, vector in (("weight", weight), ("shift", shift)):
        check(
            vector.shape == word.shape[1:],
            lambda: f"{name} has shape {tuple(vector.shape)}; word needs [{word.shape[1]}].",
        )
    check(0 <= dropout < 1, lambda: f"dropout is {dropout}; it must lie in [0, 1).")
    if dropout > 0 and seed is None:
        seed = new_seed(word.device)
    seed = seed if dropout > 0 else None
    y, _, _, second = _embedding_norm(word, position, segment, weight, shift, ids, places, kinds, seed, dropout, eps)
    return read_twice(y, second) if twice else y
