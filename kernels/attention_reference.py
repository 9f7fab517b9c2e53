"""Attention in PyTorch operations: what runs where kernels do not, sequences padded to one length.

Arguments and results are those of the operators in attention.py.

Legend: T tokens of all sequences, B sequences, S longest sequence (or padded length), H heads, D head size.
"""

from __future__ import annotations

import torch

from ds_stacking.kernels._dropout import keep_mask

LOG2_E = 1.4426950408889634


class _Padded:
    """Views of a packed batch as [B, S, ...] for the reference, with the masks that go with it."""

    def __init__(self, tokens: int, starts: torch.Tensor, longest: int, padded: bool) -> None:
        first = torch.arange(starts.numel(), device=starts.device) * longest if padded else starts[:-1].long()
        lengths = starts if padded else starts.diff()
        self.position = torch.arange(longest, device=starts.device)
        self.real = self.position < lengths[:, None]  # [B, S]
        # padding is read from and written to one row more than there are tokens
        self.rows = torch.where(self.real, first[:, None] + self.position, tokens)  # [B, S]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [B, H, S, D], zeros beyond each sequence, at least fp32."""
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.rows]
        return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))

    def unpad(self, x: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, S, D] -> [T, H, D], zeros on tokens of no sequence."""
        out = x.new_zeros(tokens + 1, x.shape[1], x.shape[3], dtype=dtype)
        out[self.rows] = torch.where(self.real[..., None, None], x.transpose(1, 2), 0).to(dtype)
        return out[:tokens]

    def hidden(self, causal: bool) -> torch.Tensor:
        """True where a query may not see a key, [B, 1, S or 1, S]."""
        hidden = ~self.real[:, None, None, :]
        return hidden | (self.position[None, :] > self.position[:, None]) if causal else hidden

    def keep(self, seed: torch.Tensor, heads: int, p: float) -> torch.Tensor:
        """The dropout mask, [B, H, S, S]."""
        rows = self.rows[:, None, :] * heads + torch.arange(heads, device=self.rows.device)[:, None]
        return keep_mask(seed, rows[..., None], self.position, p)


def forward_reference(qkv, starts, seed, longest, padded, causal, scale, p):
    batch, tokens = _Padded(len(qkv), starts, longest, padded), len(qkv)
    q, k, v = (batch.pad(part) for part in qkv.unbind(1))  # [B, H, S, D]
    scores = (q @ k.mT * scale).masked_fill_(batch.hidden(causal), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    probabilities = (scores - lse).exp_().nan_to_num_(0.0)  # rows of empty sequences see no key
    if p > 0:
        probabilities = torch.where(batch.keep(seed, q.shape[1], p), probabilities / (1 - p), 0.0)
    out = batch.unpad(probabilities @ v, tokens, qkv.dtype)
    return out.contiguous(), batch.unpad(lse * LOG2_E, tokens, lse.dtype)[..., 0].mT.contiguous()


def backward_reference(dout, qkv, starts, seed, lse, longest, padded, causal, scale, p, biased):
    batch, tokens = _Padded(len(qkv), starts, longest, padded), len(qkv)
    q, k, v = (batch.pad(part) for part in qkv.unbind(1))  # [B, H, S, D]
    do, lse = batch.pad(dout), batch.pad(lse.mT[..., None])
    probabilities = (q @ k.mT * scale - lse / LOG2_E).exp_().masked_fill_(batch.hidden(causal), 0.0)
    dp, kept = do @ v.mT, probabilities
    if p > 0:
        keep = batch.keep(seed, q.shape[1], p)
        dp, kept = (torch.where(keep, x / (1 - p), 0.0) for x in (dp, probabilities))
    ds = probabilities * (dp - (probabilities * dp).sum(-1, keepdim=True)) * scale
    parts = (ds @ k, ds.mT @ q, kept.mT @ do)  # zeros on padding
    dqkv = torch.stack([batch.unpad(x, tokens, qkv.dtype) for x in parts], dim=1)
    return dqkv, torch.cat([x.sum((0, 2)).flatten() for x in parts]).to(qkv.dtype) if biased else qkv.new_empty(0)
