"""Multi-head attention over packed QKV: unpadded or padded, bidirectional or causal, with dropout.

    P = softmax(scale * Q K^T)              O = drop(P) V
    dV = drop(P)^T dO                       dP = drop(dO V^T)
    dS = P * (dP - rowsum(dO * O))          dQ = scale * dS K            dK = scale * dS^T Q

A bias that was added to QKV gets its gradient, dQKV's sum over tokens, from the same backward pass.

Only O and the rows' log-sum-exp are kept; the backward pass computes P again (Dao et al. 2022, FlashAttention; Dao
2023). Softmax runs in base 2 with fp32 statistics. Every result is deterministic. The backward pass has three forms:

    backward_short      a whole head in registers: up to 128 tokens (64 on sm_80 and sm_100), 64 channels, 16 bits
    backward_heads      a whole head, dQ summed in the L2 cache: on sm_90, where `whole_heads` finds that it pays
    backward_queries    dQ, and backward_keys dK and dV: seven products instead of five, no sums between programs

Rotary positions would enter where q and k are loaded, and turn dQ and dK back where these are stored; a local window
where `begin`, `whole` and `end` bound the loops over tiles, as CAUSAL does, and the masked tiles' `visible`.

Legend: T tokens of all sequences, B sequences, S longest sequence (or padded length), H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.library import triton_op

import ds_stacking.kernels.attention_backward_kernels as backward
import ds_stacking.kernels.attention_heads_kernel as heads_kernel
import ds_stacking.kernels.attention_kernels as attention_kernels
from ds_stacking.kernels._columns import sum_partials
from ds_stacking.kernels._dropout import new_seed, threshold
from ds_stacking.kernels._launch import (
    Configs,
    Kernel,
    check,
    launch,
    multiprocessors,
    readable,
    runs_kernels,
    target_of,
)
from ds_stacking.kernels.attention_reference import LOG2_E, backward_reference, forward_reference

Tile = tuple[int, int, int, int]


def _configs(tiles: dict[tuple[str, int], list[Tile]], exact_warps: int) -> Configs:
    """(BLOCK_M, BLOCK_N, warps, stages) per target and head size; fp32 is exact and slow, in small tiles."""

    def configs(target: str, meta: dict[str, Any]) -> list[triton.Config]:
        if meta["ITEMSIZE"] == 4 or meta["BLOCK_D"] > 128:
            found = [(32, 32, exact_warps, 1)]
        else:
            found = tiles[target, 64 if meta["BLOCK_D"] <= 64 else 128]
        return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in found]

    return configs


FORWARD = Kernel(
    fn=attention_kernels.forward,
    key=("longest", "tokens"),
    configs=_configs(
        {
            ("sm_80", 64): [(128, 64, 8, 2)],
            ("sm_80", 128): [(128, 32, 8, 2)],
            ("sm_90", 64): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3)],
            ("sm_90", 128): [(128, 64, 8, 2), (64, 64, 4, 2)],
            ("sm_100", 64): [(128, 64, 8, 3)],
            ("sm_100", 128): [(128, 64, 8, 2)],
            ("gfx942", 64): [(64, 64, 4, 1)],
            ("gfx942", 128): [(128, 32, 4, 1)],
        },
        exact_warps=8,
    ),
)
BACKWARD_QUERIES = Kernel(
    fn=backward.backward_queries,
    key=("longest", "tokens"),
    configs=_configs(
        {
            ("sm_80", 64): [(64, 32, 4, 2)],
            ("sm_80", 128): [(64, 32, 4, 2)],
            ("sm_90", 64): [(128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 1)],
            ("sm_90", 128): [(64, 64, 4, 2), (128, 64, 8, 2)],
            ("sm_100", 64): [(64, 64, 4, 2)],
            ("sm_100", 128): [(64, 64, 4, 2)],
            ("gfx942", 64): [(64, 32, 4, 1)],
            ("gfx942", 128): [(64, 32, 4, 1)],
        },
        exact_warps=8,
    ),
)
BACKWARD_KEYS = Kernel(
    fn=backward.backward_keys,
    key=("longest", "tokens"),
    configs=_configs(
        {
            ("sm_80", 64): [(32, 32, 4, 2)],
            ("sm_80", 128): [(32, 64, 8, 2)],
            ("sm_90", 64): [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3)],
            ("sm_90", 128): [(64, 64, 8, 2), (32, 128, 8, 2)],
            ("sm_100", 64): [(64, 64, 4, 2)],
            ("sm_100", 128): [(64, 64, 8, 2)],
            ("gfx942", 64): [(64, 64, 4, 1)],
            ("gfx942", 128): [(32, 64, 4, 1)],
        },
        exact_warps=4,
    ),
)


def _short_configs(target: str, meta: dict[str, Any]) -> list[triton.Config]:
    if meta["BLOCK"] > _longest_short(target):
        return []
    # two stages keep the next head's loads in flight; at 128 tokens later Tritons than 3.6 spill registers for it
    registers_left = triton.__version__.startswith("3.6.") or meta["BLOCK"] < 128
    stages = (1, 2) if target == "sm_90" and meta["ITEMSIZE"] == 2 and registers_left else (1,)
    return [triton.Config({"STAGES": stage}, num_warps=8 if meta["BLOCK"] == 128 else 4) for stage in stages]


def _longest_short(target: str) -> int:
    """Longest sequence whose heads one program can hold, in 16-bit types and up to 64 channels."""
    return {"sm_90": 128, "gfx942": 0}.get(target, 64)  # elsewhere larger tiles spill registers


def _heads_configs(target: str, meta: dict[str, Any]) -> list[triton.Config]:
    if target != "sm_90":
        return []
    # 128 keys, since each tile of keys adds to all of dQ; more than 32 queries at a time spill registers
    return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2)]


BACKWARD_HEADS = Kernel(fn=heads_kernel.backward_heads, key=("longest", "tokens"), configs=_heads_configs)
BACKWARD_SHORT = Kernel(fn=backward.backward_short, configs=_short_configs, key=("tokens",))


def whole_heads(target: str, longest: int, pairs: int, size: int, itemsize: int, processors: int) -> bool:
    """Whether one program should differentiate a whole head: five products instead of seven, but fewer programs.

    Each head takes about three quarters of its time with seven products, by arithmetic (docs/kernels.md). The `pairs`
    heads of all sequences keep `processors` busy for whole rounds, the last one perhaps in part. Above 1,024 tokens
    the scratch of all programs exceeds the L2 cache.
    """
    fits = target == "sm_90" and longest <= 1024 and size <= 64 and itemsize == 2
    return fits and pairs > 0.75 * processors * -(-pairs // processors)


@triton_op("ds_stacking::attention", mutates_args=())
def _attention(
    qkv: torch.Tensor,
    starts: torch.Tensor,
    seed: torch.Tensor | None,
    bias: torch.Tensor | None,
    longest: int,
    padded: bool,
    causal: bool,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(O [T, H, D], log2-sum-exp2 of the scaled scores [H, T] fp32); `bias` is in qkv and not read."""
    if not runs_kernels(qkv):
        return forward_reference(qkv, starts, seed, longest, padded, causal, scale, p)
    tokens, _, heads, size = qkv.shape
    out = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    pairs = (starts.numel() - (not padded)) * heads
    launch(
        FORWARD, lambda meta: (triton.cdiv(longest, meta["BLOCK_M"]) * pairs,), qkv, starts,
        starts if seed is None else seed, out, lse, longest, tokens, scale * LOG2_E, 1 / (1 - p),
        **kernel_shape(heads, size, padded, causal, p),
    )  # fmt: skip
    return out, lse


def kernel_shape(heads: int, size: int, padded: bool, causal: bool, p: float) -> dict[str, Any]:
    block = max(16, triton.next_power_of_2(size))
    return {
        "H": heads, "D": size, "BLOCK_D": block, "PADDED": padded, "CAUSAL": causal, "THRESHOLD": threshold(p),
    }  # fmt: skip


@triton_op("ds_stacking::attention_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    starts: torch.Tensor,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    longest: int,
    padded: bool,
    causal: bool,
    scale: float,
    p: float,
    biased: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dQKV [T, 3, H, D], its column sums [3 * H * D] if `biased`, else nothing)."""
    if not runs_kernels(qkv):
        return backward_reference(dout, qkv, starts, seed, lse, longest, padded, causal, scale, p, biased)
    tokens, _, heads, size = qkv.shape
    dqkv = torch.empty_like(qkv)
    sequences = starts.numel() - (not padded)
    pairs = sequences * heads
    seed = starts if seed is None else seed
    scales = (scale * LOG2_E, 1 / (1 - p), scale)
    shape = kernel_shape(heads, size, padded, causal, p) | {"HAS_BIAS": biased}
    partials = lse  # in place of what is not written
    if longest <= _longest_short(target_of(qkv.device)) and size <= 64 and qkv.element_size() == 2:
        block = max(16, triton.next_power_of_2(longest))
        programs = min(pairs, 2 * multiprocessors(qkv.device))
        if biased:
            partials = lse.new_empty(sequences, 3, heads * size)
        launch(
            BACKWARD_SHORT, (programs,), qkv, starts, seed, lse, dout, dqkv, partials, longest, tokens, pairs,
            programs, *scales, BLOCK=block, **shape,
        )  # fmt: skip
        return dqkv, _bias_gradient(partials, dqkv, biased)
    processors = multiprocessors(qkv.device)
    if whole_heads(target_of(qkv.device), longest, pairs, size, qkv.element_size(), processors):
        programs, room = min(pairs, processors), -(-longest // 64) * 64
        scratch = torch.empty(programs, room * (shape["BLOCK_D"] + 4), dtype=torch.float32, device=qkv.device)
        if biased and causal and p > 0:  # Triton 3.6 would spill 8 bytes for it
            shape["HAS_BIAS"] = False
        elif biased:
            partials = lse.new_empty(sequences, 3, heads * size)
        launch(
            BACKWARD_HEADS, (programs,), qkv, starts, seed, out, lse, dout, scratch, dqkv, partials, longest, tokens,
            pairs, programs, room, *scales, **shape,
        )  # fmt: skip
        if biased and not shape["HAS_BIAS"]:
            return dqkv, dqkv.flatten(1).sum(0)
        return dqkv, _bias_gradient(partials, dqkv, biased)
    delta = torch.empty_like(lse)
    if biased:  # zeros, since not every row is written
        partials = lse.new_zeros(sequences + tokens // 32, 3, heads * size)
    launch(
        BACKWARD_QUERIES, lambda meta: (triton.cdiv(longest, meta["BLOCK_M"]) * pairs,), qkv, starts, seed, out, lse,
        dout, delta, dqkv, partials, longest, tokens, *scales, **shape,
    )  # fmt: skip
    launch(
        BACKWARD_KEYS, lambda meta: (triton.cdiv(longest, meta["BLOCK_N"]) * pairs,), qkv, starts, seed, lse, dout,
        delta, dqkv, partials, longest, tokens, *scales, **shape,
    )  # fmt: skip
    return dqkv, _bias_gradient(partials, dqkv, biased)


def _bias_gradient(partials: torch.Tensor, dqkv: torch.Tensor, biased: bool) -> torch.Tensor:
    return sum_partials(partials, dqkv.dtype).flatten() if biased else dqkv.new_empty(0)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # lse has no gradient: no zeros are made for it
    qkv, starts, seed, _, ctx.longest, ctx.padded, ctx.causal, ctx.scale, ctx.p = inputs
    ctx.save_for_backward(qkv, starts, seed, *output)


def _differentiate(ctx, dout, _):
    qkv, starts, seed, out, lse = ctx.saved_tensors
    biased = ctx.needs_input_grad[3]
    dqkv, dbias = _attention_backward(
        dout.contiguous(), qkv, starts, seed, out, lse, ctx.longest, ctx.padded, ctx.causal, ctx.scale, ctx.p, biased
    )
    return dqkv, None, None, dbias if biased else None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention inside each of several sequences that lie one after the other.

    Args:
        qkv: [T, 3, H, D], contiguous; bf16, fp16 or fp32.
        cu_seqlens: int32 [B + 1], cumulative lengths from 0 to T; empty sequences are allowed.
        max_seqlen: length of the longest sequence, or more; it is rounded up to a power of two, so that kernels are
            tuned and models compiled for few lengths.
        causal: tokens see themselves and what precedes them.
        dropout: rate in [0, 1) of the probabilities.
        seed: int64 [1] on qkv's device; drawn from the device's default generator where it is needed and absent.
        softmax_scale: default 1 / sqrt(D).
        bias: [3 * H * D] like qkv, which holds it already: what is missing there is only its gradient, the sum of
            qkv's over tokens in fp32. Add it detached.

    Returns:
        [T, H, D] in qkv's dtype.

    Raises:
        ValueError: shapes, dtypes or rate do not fit.
    """
    longest = power_of_two(max_seqlen)
    check(qkv.dim() == 4 and qkv.shape[1] == 3, lambda: f"qkv has shape {tuple(qkv.shape)}; it must be [T, 3, H, D].")
    check_sequences(qkv, cu_seqlens, "qkv", "cu_seqlens", longest, dropout)
    if readable(cu_seqlens):
        last = int(cu_seqlens[-1])
        check(last == qkv.shape[0], lambda: f"cu_seqlens ends at {last}, but qkv holds {qkv.shape[0]} tokens.")
    return _apply(qkv, cu_seqlens, longest, False, causal, dropout, seed, softmax_scale, bias)


def attention_padded(
    qkv: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in a padded batch; arguments as for `attention`.

    Args:
        qkv: [B, S, 3, H, D], contiguous.
        lengths: int32 [B], tokens of each sequence; the rest of its row is padding. None: all S.

    Returns:
        [B, S, H, D]; zeros, in the gradient too, on padding.
    """
    check(
        qkv.dim() == 5 and qkv.shape[2] == 3, lambda: f"qkv has shape {tuple(qkv.shape)}; it must be [B, S, 3, H, D]."
    )
    batch, longest = qkv.shape[:2]
    if lengths is None:
        lengths = torch.full((batch,), longest, dtype=torch.int32, device=qkv.device)
    check(lengths.numel() == batch, lambda: f"lengths has {lengths.numel()} entries for {batch} sequences.")
    check_sequences(qkv, lengths, "qkv", "lengths", longest, dropout)
    out = _apply(qkv.flatten(0, 1), lengths, longest, True, causal, dropout, seed, softmax_scale, bias)
    return out.unflatten(0, (batch, longest))


def power_of_two(length: int) -> int:
    """The next power of two, at least 16: by comparisons, so that code compiled for any length serves all up to it."""
    power = 16
    while power < length:
        power *= 2
    return power


def _apply(qkv, starts, longest, padded, causal, dropout, seed, softmax_scale, bias):
    if bias is not None:
        width = 3 * qkv.shape[-2] * qkv.shape[-1]
        check(
            bias.shape == (width,) and bias.dtype == qkv.dtype,
            f"bias is {bias.dtype} {tuple(bias.shape)}; it must be {qkv.dtype} [{width}].",
        )
    if dropout > 0 and seed is None:
        seed = new_seed(qkv.device)
    scale = softmax_scale or qkv.shape[-1] ** -0.5
    return _attention(qkv, starts, seed if dropout > 0 else None, bias, longest, padded, causal, scale, dropout)[0]


def check_sequences(
    packed: torch.Tensor, starts: torch.Tensor, packed_name: str, name: str, longest: int, dropout: float
) -> None:
    """Raise ValueError unless the tensor of tokens `packed` [..., H, D] and the sequences' `starts` fit together."""
    shape = tuple(packed.shape)
    check(
        packed.is_contiguous(),
        lambda: f"{packed_name} has strides {packed.stride()} for shape {shape}; make it contiguous.",
    )
    check(starts.dtype == torch.int32, lambda: f"{name} has dtype {starts.dtype}; it must be torch.int32.")
    check(
        starts.device == packed.device,
        lambda: f"{name} is on {starts.device} and {packed_name} on {packed.device}; move the one.",
    )
    check(starts.dim() == 1, lambda: f"{name} has shape {tuple(starts.shape)}; it must have one dimension.")
    check(0 <= dropout < 1, lambda: f"dropout is {dropout}; it must lie in [0, 1).")
    elements = longest * 3 * packed.shape[-1] * packed.shape[-2]
    check(
        elements < 2**31,
        lambda: f"a sequence of {longest} tokens spans {elements} elements; the limit is {2**31 - 1}.",
    )
