"""Attention of selected queries to all tokens of their sequences: all that the last layer owes to a head that reads
some tokens only.

The same numbers, dropout included, as `attention` gives for these tokens, and the same gradients where the others'
are zero; what the other queries would cost is not spent: their projections, six sevenths of the scores at a masking
rate of 15 %, their rows of O and dO. Bidirectional and without padding; deterministic like `attention`.

Legend: T tokens of all sequences, B sequences, R selected tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.library import triton_op

import ds_stacking.kernels.selected_attention_kernels as selected_kernels
from ds_stacking.kernels._dropout import new_seed
from ds_stacking.kernels._launch import Kernel, check, launch, readable, runs_kernels
from ds_stacking.kernels.attention import check_sequences, kernel_shape, power_of_two
from ds_stacking.kernels.attention_reference import LOG2_E, backward_reference, forward_reference


def _configs(target: str, meta: dict[str, Any]) -> list[triton.Config]:
    """On Hopper a tile of queries holds the selected ones of 400 tokens; elsewhere that spills registers."""
    if target != "sm_90" or meta["ITEMSIZE"] == 4 or meta["BLOCK_D"] > 64:
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1)]
    return [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2)]


FORWARD = Kernel(fn=selected_kernels.selected_forward, configs=_configs)
BACKWARD_QUERIES = Kernel(fn=selected_kernels.selected_backward_queries, configs=_configs)
BACKWARD_KEYS = Kernel(fn=selected_kernels.selected_backward_keys, configs=_configs)


@triton_op("ds_stacking::selected_attention", mutates_args=())
def _selected(
    q: torch.Tensor,
    kv: torch.Tensor,
    starts: torch.Tensor,
    bounds: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor,
    seed: torch.Tensor | None,
    longest: int,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O [R, H, D], log2-sum-exp2 of the scaled scores [H, R] fp32)."""
    (selected, heads, size), pairs = q.shape, (starts.numel() - 1) * q.shape[1]
    if not runs_kernels(q):
        places = _places(order, tokens)
        out, lse = forward_reference(_packed(q, kv, places), starts, seed, longest, False, False, scale, p)
        return out[places], lse[:, places].contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(heads, selected, dtype=torch.float32, device=q.device)
    launch(
        FORWARD, lambda meta: (triton.cdiv(longest, meta["BLOCK_M"]) * pairs,), q, kv, starts, bounds, order, tokens,
        starts if seed is None else seed, out, lse, longest, selected, scale * LOG2_E, 1 / (1 - p),
        **_shape(heads, size, p),
    )  # fmt: skip
    return out, lse


@triton_op("ds_stacking::selected_attention_backward", mutates_args=())
def _selected_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    starts: torch.Tensor,
    bounds: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    longest: int,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dQ [R, H, D] and dKV [T, 2, H, D]."""
    (selected, heads, size), pairs = q.shape, (starts.numel() - 1) * q.shape[1]
    if not runs_kernels(q):
        places = _places(order, tokens)
        every = [x.new_zeros(kv.shape[0], *x.shape[1:]).index_copy(0, places, x) for x in (dout, lse.mT)]
        dqkv, _ = backward_reference(
            every[0], _packed(q, kv, places), starts, seed, every[1].mT.contiguous(), longest, False, False, scale,
            p, False,
        )  # fmt: skip
        return dqkv[places, 0], dqkv[:, 1:].contiguous()
    dq, dkv, delta = torch.empty_like(q), torch.empty_like(kv), torch.empty_like(lse)
    index = (starts, bounds, order, tokens, starts if seed is None else seed)
    scales = (scale * LOG2_E, 1 / (1 - p), scale)
    launch(
        BACKWARD_QUERIES, lambda meta: (triton.cdiv(longest, meta["BLOCK_M"]) * pairs,), q, kv, *index, out, lse,
        dout, delta, dq, longest, selected, *scales, **_shape(heads, size, p),
    )  # fmt: skip
    launch(
        BACKWARD_KEYS, lambda meta: (triton.cdiv(longest, meta["BLOCK_N"]) * pairs,), q, kv, *index, lse, dout,
        delta, dkv, longest, selected, *scales, **_shape(heads, size, p),
    )  # fmt: skip
    return dq, dkv


def _shape(heads: int, size: int, p: float) -> dict[str, Any]:
    shape = kernel_shape(heads, size, False, False, p)
    return {name: value for name, value in shape.items() if name not in ("PADDED", "CAUSAL")}


def _places(order: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The selected tokens in the selection's own order, [R]."""
    return torch.empty_like(tokens).index_copy(0, order, tokens)


def _packed(q: torch.Tensor, kv: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, D] with zeros for the queries of other tokens."""
    every = q.new_zeros(kv.shape[0], *q.shape[1:]).index_copy(0, places, q)
    return torch.cat([every[:, None], kv], dim=1)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # lse has no gradient: no zeros are made for it
    *tensors, ctx.longest, ctx.scale, ctx.p = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dout, _):
    dq, dkv = _selected_backward(dout.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale, ctx.p)
    return dq, dkv, None, None, None, None, None, None, None, None


_selected.register_autograd(_differentiate, setup_context=_save)


def selected_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    indices: torch.Tensor,
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attention of the tokens `indices` to all tokens of their sequences.

    Args:
        q: [R, H, D], contiguous: the queries of these tokens alone, in the order of `indices`.
        kv: [T, 2, H, D], contiguous, in q's dtype.
        cu_seqlens, max_seqlen, dropout, seed, softmax_scale: as for `attention`.
        indices: int64 [R], tokens in any order, without repeats.

    Returns:
        [R, H, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or rate do not fit; on a CPU also indices that repeat or lie in no sequence.
    """
    longest = power_of_two(max_seqlen)
    check(
        q.dim() == 3 and kv.dim() == 4 and kv.shape[1:] == (2, *q.shape[1:]) and kv.dtype == q.dtype,
        lambda: (
            f"q is {q.dtype} {tuple(q.shape)} and kv {kv.dtype} {tuple(kv.shape)}; "
            f"they must be [R, H, D] and [T, 2, H, D] of one dtype."
        ),
    )
    check(
        indices.dtype == torch.int64 and indices.shape == q.shape[:1] and indices.device == q.device,
        lambda: (
            f"indices is {indices.dtype} {tuple(indices.shape)} on {indices.device}; "
            f"it must be torch.int64 [{q.shape[0]}] on {q.device}."
        ),
    )
    check(q.is_contiguous(), lambda: f"q has strides {q.stride()} for shape {tuple(q.shape)}; make it contiguous.")
    check_sequences(kv, cu_seqlens, "kv", "cu_seqlens", longest, dropout)
    tokens, order = indices.sort()
    if readable(tokens):
        _check_selection(tokens, cu_seqlens, kv.shape[0])
    bounds = torch.searchsorted(tokens, cu_seqlens.long(), out_int32=True)
    if dropout > 0 and seed is None:
        seed = new_seed(q.device)
    scale = softmax_scale or q.shape[-1] ** -0.5
    seed = seed if dropout > 0 else None
    return _selected(q, kv, cu_seqlens, bounds, order, tokens, seed, longest, scale, dropout)[0]


def _check_selection(tokens: torch.Tensor, starts: torch.Tensor, count: int) -> None:
    """Raise ValueError unless the sorted `tokens` differ and lie in the sequences that begin at `starts`."""
    first, last = int(starts[0]), int(starts[-1])
    check(last == count, lambda: f"cu_seqlens ends at {last}, but kv holds {count} tokens.")
    if tokens.numel():
        low, high = int(tokens[0]), int(tokens[-1])
        check(
            first <= low <= high < last,
            lambda: f"indices reaches from {low} to {high}; it must lie in [{first}, {last}), the sequences' tokens.",
        )
    repeated = tokens[1:][tokens.diff() == 0]
    check(repeated.numel() == 0, lambda: f"indices holds {int(repeated[0])} more than once; select each token once.")
