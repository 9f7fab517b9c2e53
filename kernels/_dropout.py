"""Dropout whose mask is a function of (seed, row, column), the same in every kernel and in PyTorch.

keep(row, column) = (r * c mod 2^32) >= p * 2^32, where r is an odd 32-bit hash of (seed, row) and c a 32-bit hash of
(seed, column): multiplicative hashing (Dietzfelbinger et al. 1997). One multiplication and one comparison per
element, where Philox needs about sixty instructions; row and column hashes are vectors. Nothing is stored for the
backward pass. The finalizer is the "lowbias32" of C. Wellons (prospecting for hash functions, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MASK = 0xFFFFFFFF


@triton.jit
def mix32(x):
    """Bijective hash of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def seed_key(seed_ptr):
    """uint32 from the int64 seed."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return mix32(low ^ mix32(high + 0x9E3779B9))


@triton.jit
def row_hash(key, rows):
    """Odd uint32 per row."""
    return mix32(rows.to(tl.uint32) ^ key) | 1


@triton.jit
def column_hash(key, columns):
    """uint32 per column; a short hash because attention computes it in its inner loop."""
    x = columns.to(tl.uint32) * 0x9E3779B1 + key
    x ^= x >> 15
    x *= 0x85EBCA77
    return x ^ (x >> 13)


def threshold(p: float) -> int:
    """`p` as the smallest product that is kept."""
    return min(int(p * 2**32), _MASK)


def new_seed(device: torch.device) -> torch.Tensor:
    """An int64 seed of shape [1] from the default generator of `device`."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def new_seeds(number: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """So many seeds like `new_seed`'s from one draw, of which each takes 64 bits.

    They lie 16 bytes apart: Triton compiles a kernel anew for a pointer that is not aligned to that.
    """
    drawn = torch.randint(2**62, (number, 2), dtype=torch.int64, device=device)
    return drawn.narrow(1, 0, 1).unbind()


def keep_mask(seed: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, p: float) -> torch.Tensor:
    """The kernels' mask in PyTorch: bool, the broadcast shape of integer tensors `rows` and `columns`."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    key = _mix32(low ^ _mix32((high + 0x9E3779B9) & _MASK))
    r = _mix32((rows.long() & _MASK) ^ key) | 1
    c = ((columns.long() & _MASK) * 0x9E3779B1 + key) & _MASK
    c = ((c ^ (c >> 15)) * 0x85EBCA77) & _MASK
    c = c ^ (c >> 13)
    return ((r * c) & _MASK) >= threshold(p)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
